"""The calls that a worker makes of a runtime: with what, in which halves, when, and how long they may take."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis.exceptions import ConnectionError as RedisConnectionError

from service.queue.job import Claimed, Job, lane
from service.queue.rounds import Round, first_round
from service.settings import Settings
from service.worker import late_scores, watchdog
from service.worker.batch import Batch
from service.worker.batching import Slot, preview_steps
from service.worker.claims import Claims, hand_back, read
from service.worker.device import Device
from service.worker.execution import Drawn, Failure, Stopped, drawn_of, execute
from service.worker.fit import Fit
from service.worker.pictures import encode, file_of, preview_of
from service.worker.step_callback import StepCallback
from service.worker.videos import _crf
from service.worker.worker import Worker
from student.runtimes.fake import FakeRuntime, fake_image, fake_student, fake_video, fake_video_student
from student.runtimes.lengths import Lengths, compiled_lengths
from student.runtimes.runtime import FloatArray
from tests.service.support import a_job

SHAPE = ("fake", "1", 64, 64, 0, 4)


class Noted:
    """A runtime without steps; of calls larger than ``room`` it runs out of memory, and of some prompts it fails."""

    name = "noted"

    def __init__(self, room: int = 99, broken: bool = False) -> None:
        self.student, self.max_batch = fake_student(), 8
        self.room, self.broken = room, broken
        self.asked: list[tuple[list[str], list[int], int, dict[str, Any]]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, **sized: Any) -> FloatArray:
        self.asked.append((list(prompts), list(seeds), steps, sized))
        if len(prompts) > self.room:
            raise MemoryError
        if self.broken or "bad" in prompts:
            raise ValueError("bad")
        return np.zeros((len(prompts), 3, 64, 64), np.float32)


def sizes(runtime: Noted) -> list[int]:
    return [len(prompts) for prompts, *_ in runtime.asked]


def test_a_call_has_the_batches_steps_and_says_a_size_or_length_only_where_it_is_another() -> None:
    runtime = Noted()
    execute(runtime, [a_job(prompt="a", seeds=(1, 2), steps=2), a_job(prompt="b", seeds=(9,), steps=2)])
    execute(runtime, [a_job(height=96, width=32)])
    assert runtime.asked == [(["a", "a", "b"], [1, 2, 9], 2, {}), (["a red heart"], [7], 4, {"size": (96, 32)})]
    runtime.student = fake_video_student()
    execute(runtime, [a_job(frames=9)])
    execute(runtime, [a_job(frames=5, width=32)])
    assert [sized for *_, sized in runtime.asked[2:]] == [{}, {"size": (64, 32), "frames": 5}]


def test_a_call_without_memory_is_halved_and_each_call_says_how_often() -> None:
    """Five do not fit, nor three: 5 → 2 + 3 → 1 + 2. Each halving is told once, by the first call of it."""
    runtime, guarded = Noted(room=2), list[int]()

    @contextmanager
    def guard(images: int) -> Iterator[None]:
        guarded.append(images)
        yield

    executed = execute(runtime, [a_job(seeds=(1, 2, 3, 4, 5))], guard=guard)
    assert sizes(runtime) == guarded == [5, 2, 3, 1, 2]
    assert [(len(call.slots), call.splits) for call in executed.calls] == [(2, 1), (1, 1), (2, 0)]
    assert [call.slots[0].seed for call in executed.calls] == [1, 3, 4] and executed.failures == {}
    rows = drawn_of(executed, 0)
    assert [call.slots[row].index for call, row in rows] == [0, 1, 2, 3, 4]
    alone = execute(Noted(room=1), [a_job(seeds=(1, 2, 3, 4, 5))]).calls  # four halvings
    assert [(call.slots[0].seed, call.splits) for call in alone] == [(1, 2), (2, 0), (3, 1), (4, 1), (5, 0)]


def test_what_did_not_fit_is_not_tried_again_with_each_batch_but_after_ten_minutes() -> None:
    clock = [0.0]
    runtime, fit = Noted(room=2), Fit(lambda: clock[0])
    five, small = a_job(seeds=(1, 2, 3, 4, 5)), a_job(seeds=(1, 2, 3), height=32, width=32)
    for _ in range(2):
        execute(runtime, [five], fit=fit)
    assert sizes(runtime) == [5, 2, 3, 1, 2] + [1, 2, 2], "two fit: three calls, as even as can be"
    clock[0] = 599.0
    assert [len(call.slots) for call in execute(runtime, [five], fit=fit).calls] == [1, 2, 2]
    runtime.room = 99
    execute(runtime, [small], fit=fit)
    assert sizes(runtime)[-1] == 3, "another size has another memory"
    clock[0] = 601.0
    execute(runtime, [five], fit=fit)
    assert sizes(runtime)[-1] == 5, "and what took the memory may be gone"
    runtime.room = 1
    execute(runtime, [five], fit=fit)
    execute(runtime, [five], fit=fit)
    assert sizes(runtime)[-5:] == [1] * 5, "what was drawn before says nothing about now"


def test_a_job_that_is_tried_alone_is_drawn_in_calls_that_fit() -> None:
    runtime, fit = Noted(room=2), Fit()
    execute(runtime, [a_job(seeds=(1, 2, 3, 4)), a_job(prompt="bad")], fit=fit)
    assert sizes(runtime) == [5, 2, 3, 1, 2] + [2, 2] + [1, 1], "the last one: the warm-up's picture"
    execute(runtime, [a_job(seeds=(1, 2, 3, 4))], fit=fit)
    assert sizes(runtime)[-2:] == [2, 2]


def test_one_image_without_memory_is_not_halved() -> None:
    executed = execute(Noted(room=0), [a_job()])
    assert executed.device_lost and executed.calls == ()


def test_whether_a_job_or_the_device_is_at_fault_is_tried_with_the_picture_of_the_warm_up() -> None:
    runtime, guarded = Noted(), list[int]()

    @contextmanager
    def guard(images: int) -> Iterator[None]:
        guarded.append(images)
        yield

    executed = execute(runtime, [a_job(prompt="bad", seeds=(1, 2))], guard=guard)
    assert runtime.asked[1] == (["a"], [0], 1, {}) and guarded == [2, 1]
    assert executed.failures == {0: Failure("generation_failed", "The image could not be generated.")}
    assert not executed.device_lost
    lost = execute(Noted(broken=True), [a_job()])
    assert (lost.undrawn, lost.failures, lost.device_lost) == (frozenset({0}), {}, True)


def test_a_batch_that_fails_is_drawn_job_by_job_until_the_device_is_lost() -> None:
    jobs = [a_job(prompt=prompt, seeds=(k,)) for k, prompt in enumerate(("a", "bad", "c"))]
    executed = execute(Noted(), jobs)
    assert [[(slot.job, slot.seed) for slot in call.slots] for call in executed.calls] == [[(0, 0)], [(2, 2)]]
    assert set(executed.failures) == {1} and not executed.undrawn

    class Dying(Noted):
        def draw(self, prompts: Sequence[str], *args: Any, **sized: Any) -> FloatArray:
            self.broken = self.broken or "bad" in prompts and len(prompts) == 1
            return super().draw(prompts, *args, **sized)

    executed = execute(Dying(), jobs)
    assert [call.slots[0].job for call in executed.calls] == [0] and executed.undrawn == {1, 2}


def test_a_call_that_nobody_needs_any_more_gives_nothing_and_the_next_one_goes_on() -> None:
    runtime = FakeRuntime()
    runtime.max_batch = 1
    seen: list[tuple[int, int]] = []

    def watching(slots: Sequence[Slot], step: int, preview: Any) -> None:
        seen.append((slots[0].seed, step))
        if slots[0].seed == 1:
            raise Stopped

    executed = execute(runtime, [a_job(seeds=(1,)), a_job(seeds=(2,))], watching)
    assert [call.slots[0].seed for call in executed.calls] == [2] and not executed.failures
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 2)]


def claimed(job: Job, **changes: Any) -> Claimed:
    payload = json.dumps({**json.loads(job.to_payload()), **changes})
    return Claimed(job.id, "1", payload, 1, 0.0)


VIDEO = fake_video_student()


@pytest.mark.parametrize(
    ("student", "changes", "words"),
    [
        (fake_student(), {}, None),
        (fake_student(), {"steps": 3}, "The worker's student was not trained for 3 steps."),
        (fake_student(), {"width": 32}, "The worker's student cannot generate 32x64 pixels."),
        (fake_student(), {"frames": 5}, "The worker's student does not draw videos of 5 frames of this size."),
        (VIDEO, {"frames": 9}, None),
        (VIDEO, {"frames": 33}, None),
        (VIDEO, {"frames": 10}, "The worker's student does not draw videos of 10 frames of this size."),
        (VIDEO, {"frames": 37}, "The worker's student does not draw videos of 37 frames of this size."),
        (VIDEO, {}, "The worker's student does not draw pictures of this size."),
    ],
)  # fmt: skip
def test_a_job_that_a_runtime_does_not_draw_fails_and_says_why(
    student: Any, changes: dict[str, Any], words: str
) -> None:
    found = read(claimed(a_job(**changes)), FakeRuntime(student))
    if words is None:
        assert isinstance(found, Round) and found.job.frames == changes.get("frames", 0)
    else:
        assert found == Failure("generation_failed", words)


def test_a_compiled_runtime_draws_its_sizes_and_lengths_and_no_others() -> None:
    runtime: Any = FakeRuntime(VIDEO)
    runtime = SimpleNamespace(
        student=VIDEO, sizes=((64, 64), (96, 32)), lengths={(64, 64): compiled_lengths([5, 9]), (96, 32): Lengths(1, 9)}
    )
    ok = [("h", 64, 64, 9), ("h", 96, 32, 4)]
    wrong = [("h", 64, 64, 7), ("h", 96, 32, 10), ("h", 32, 96, 5)]
    found = [read(claimed(a_job(height=h, width=w, frames=f)), runtime) for _, h, w, f in [*ok, *wrong]]
    assert [isinstance(one, Round) for one in found] == [True, True, False, False, False]


def test_a_payload_that_cannot_be_read_is_told_so() -> None:
    found = read(Claimed("i", "1", "{}", 1, 0.0), FakeRuntime())
    assert found == Failure("generation_failed", "The worker cannot run this job: the job cannot be read.")


@pytest.mark.parametrize(
    ("costs", "usual_s", "previews", "watched"),
    [
        (False, None, 0, True), (False, 0.1, 0, True), (True, None, 0, True), (True, 0.99, 0, False),
        (True, 0.99, 1, True), (True, 1.01, 0, True),
    ],
)  # fmt: skip
def test_where_watching_costs_something_only_long_calls_and_previews_are_watched(
    costs: bool, usual_s: float | None, previews: int, watched: bool
) -> None:
    runtime: Any = FakeRuntime()
    runtime.watching_costs = costs
    jobs = [a_job(), a_job(previews=previews)]
    batch = Batch(runtime, tuple(map(claimed, jobs)), tuple(map(first_round, jobs)))
    device = Device()
    if usual_s is not None:
        device.measured(batch.shape, batch.images, usual_s)
    worker: Any = SimpleNamespace(device=device, _heartbeat=None, _finisher=None)
    assert isinstance(Worker._watching(worker, batch), StepCallback) is watched


@pytest.mark.parametrize(
    ("student", "steps", "shape"),
    [
        (fake_student(), 2, ("fake", "1", 64, 64, 0, 2)),
        (replace(VIDEO, image=replace(VIDEO.image, height=32, width=96)), 4,
         (VIDEO.id, "1", 32, 96, VIDEO.image.frames, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["drawn", "the last one", "failed"])
def test_a_picture_of_a_probe_is_one_call_that_is_bounded_and_over_whatever_becomes_of_it(
    student: Any, steps: int, shape: Any, how: str
) -> None:
    done = list[Any]()

    @contextmanager
    def watching(what: str, bound_s: float) -> Iterator[None]:
        done.append((what, bound_s, worker.device.idle))
        yield

    def draw(run: Any) -> bool:
        if how == "failed":
            raise RuntimeError("the device is gone")
        return how == "the last one"

    prober = SimpleNamespace(
        draw=draw, failed=lambda run: done.append("failed"), take=lambda run: ["pictures"],
        settle=lambda run, images: done.append(("settled", run, images)),
    )  # fmt: skip
    worker: Any = SimpleNamespace(
        device=Device(), _watchdog=SimpleNamespace(watching=watching), _prober=prober,
        _bounds=SimpleNamespace(of=lambda *about: 7.0 if about == (shape, 1) else 0.0),
        _finisher=SimpleNamespace(beside=lambda action: (done.append("beside"), action())),
    )  # fmt: skip
    run: Any = SimpleNamespace(runtime=SimpleNamespace(student=student), pair=SimpleNamespace(steps=steps))
    Worker._probe(worker, run)
    ends = {"drawn": [], "failed": ["failed"], "the last one": ["beside", ("settled", run, ["pictures"])]}
    assert done == [("a call for a probe", 7.0, False), *ends[how]]
    assert worker.device.idle and worker.device.usage.starved_s < 1.0, "no job waited for it"


def test_a_batch_is_claimed_for_each_lane_with_its_own_size_and_in_time_for_what_a_claim_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice as long before the device is free as the last claim took, and at least 5 ms."""
    moments, asked = [10.0, 10.5, 20.0, 20.001], list[dict[str, int]]()
    monkeypatch.setattr("service.worker.claims.time", SimpleNamespace(monotonic=lambda: moments.pop(0)))
    small, large = FakeRuntime(), FakeRuntime()
    small.max_batch, large.max_batch = 2, 8

    def claim(lanes: dict[str, int], sizes: dict[tuple[str, str], tuple[int, ...]]) -> list[Claimed]:
        assert sizes == {}, "nothing was drawn yet"
        asked.append(lanes)
        return []

    loaded: Any = SimpleNamespace(lanes={"a": small, "b": large})
    consumer: Any = SimpleNamespace(claim=claim)
    claims = Claims(loaded, consumer, None, Device(), None)  # type: ignore[arg-type]
    margins = []
    for _ in range(2):
        assert claims.claim() is None
        margins.append(claims._margin_s)
    assert asked == [{"a": 2, "b": 8}] * 2 and margins == [pytest.approx(1.0), 0.005]


def test_of_several_models_that_one_draws_which_was_asked_though_a_mate_cannot_be_read() -> None:
    """What cannot be read does not say whose it is: a student that can draw the rest must not for that reason."""
    first, second = (FakeRuntime(replace(fake_student(), id=id)) for id in ("first", "second"))
    refused = list[tuple[str, str]]()
    loaded: Any = SimpleNamespace(lanes={lane(one.student.id, "1"): one for one in (first, second)})
    claims = Claims(loaded, None, None, Device(), lambda maker, one, _: refused.append((maker.origin.model, one.id)))  # type: ignore[arg-type]
    torn, jobs = Claimed("torn", "17", "{}", 1, 0.0), [a_job(model="second"), a_job(model="second")]
    for held in ([torn, *map(claimed, jobs)], [claimed(jobs[0]), torn, claimed(jobs[1])]):
        batch = claims._readable(held, loaded.lanes)
        assert batch is not None and batch.runtime is second and [job.id for job in batch.jobs] == [j.id for j in jobs]
    assert claims._readable([torn], loaded.lanes) is None
    assert refused == [("second", "torn"), ("second", "torn"), ("first", "torn")]


@pytest.mark.parametrize("away", [False, True])
def test_of_what_is_handed_back_nothing_is_held_any_more(away: bool) -> None:
    told, let_go = list[tuple[Any, ...]](), list[Claimed]()

    def tell(jobs: list[tuple[str, str]], spared: bool) -> None:
        told.append((jobs, spared))
        if away:
            raise RedisConnectionError

    consumer: Any = SimpleNamespace(hand_back=tell)
    heartbeat: Any = SimpleNamespace(let_go=let_go.append)
    jobs = [claimed(a_job()) for _ in range(3)]
    hand_back(consumer, heartbeat, jobs)
    hand_back(consumer, heartbeat, jobs[:2], spared=True)
    pairs = [(job.id, job.token) for job in jobs]
    assert told == [(pairs, False), (pairs[:2], True)] and let_go == [*jobs, *jobs[:2]]


def test_a_claim_says_how_many_images_are_wanted_unless_that_is_set() -> None:
    asked = list[tuple[dict[str, int], dict[tuple[str, str], tuple[int, ...]]]]()

    def claim(lanes: dict[str, int], sizes: dict[tuple[str, str], tuple[int, ...]]) -> list[Claimed]:
        asked.append((lanes, sizes))
        return []

    runtime, device = FakeRuntime(), Device()
    for images in (1, 2, 8):
        device.measured(SHAPE, images, 0.01 * images)
    device.measured(("gone", "1", 64, 64, 0, 4), 1, 0.01)
    served = lane("fake", "1")
    loaded: Any = SimpleNamespace(lanes={served: runtime})
    for batch in (0, 3, 99):
        Claims(loaded, SimpleNamespace(claim=claim), None, device, None, batch).claim()  # type: ignore[arg-type]
    assert asked == [({served: 8}, {(served, a_job().shape): (1,) * 9}), ({served: 3}, {}), ({served: 8}, {})]


def test_a_device_is_free_soon_when_its_call_is_about_to_end() -> None:
    now = [100.0]
    device = Device(lambda: now[0])
    assert device.idle and device.wait_until_free(0.0, 0.0), "nothing is drawn"
    device.measured(SHAPE, 1, 10.0)
    device.begin(SHAPE, 1, 100.0)
    device.begin(("other", "1", 64, 64, 0, 4), 1, 0.0)  # whoever took the batch has said so before
    now[0] += 7.9
    assert not device.wait_until_free(2.0, 0.0) and not device.idle
    now[0] += 0.2
    assert device.wait_until_free(2.0, 0.0) and not device.wait_until_free(1.0, 0.0)
    device.end()
    assert device.idle and device.usage.busy_s == pytest.approx(8.1)


def test_the_bounds_on_a_call_are_those_of_the_setting_s_description() -> None:
    said = str(Settings.model_fields["call_timeout_s"].description)
    assert (watchdog.TIMES_USUAL, watchdog.SHORTEST_BOUND_S, watchdog.FIRST_BOUND_S) == (20.0, 30.0, 600.0)
    assert "20 times what such a call took before, at least 30 s" in said
    assert "20 times the warm-up, at least 600 s" in said


@pytest.mark.parametrize(("quality", "crf"), [(None, 17), (100, 1), (0, 51), (50, 26), (90, 6)])
def test_the_quality_of_a_video_is_a_rate_factor(quality: int | None, crf: int) -> None:
    assert _crf(quality) == crf


@pytest.mark.parametrize(
    ("output_format", "options"),
    [
        ("png", {"compress_level": 1}), ("jpeg", {"quality": 95, "subsampling": 0}), ("webp", {"quality": 95}),
    ],
)  # fmt: skip
def test_a_file_is_what_pillow_writes_with_these_options(output_format: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    image_CHW = rng.random((3, 32, 48), np.float32)
    drawn = Image.fromarray(np.rint(image_CHW * 255).astype(np.uint8).transpose(1, 2, 0).copy())
    expected = io.BytesIO()
    drawn.save(expected, output_format, **options)
    assert encode(image_CHW, output_format) == expected.getvalue()
    if output_format != "png":
        worse = io.BytesIO()
        drawn.save(worse, output_format, **{**options, "quality": 0})
        assert encode(image_CHW, output_format, 0) == worse.getvalue()


def test_a_preview_of_a_video_is_its_first_frame_and_one_frame_may_be_a_picture() -> None:
    video = fake_video("p", 1, 4, 3)
    job = a_job(frames=3, fps=8, output_format="mp4")
    suffix, data = preview_of(job, video, None)
    assert suffix == "webp" and data == encode(video[0], "webp")
    assert preview_of(a_job(output_format="jpeg", quality=50), video[1], None) == ("jpeg", encode(video[1], "jpeg", 50))
    assert file_of(a_job(frames=1, fps=8), video[:1], None) == encode(video[0], "png")
    assert file_of(replace(job, frames=1), video[:1], None)[4:8] == b"ftyp"
    webp = file_of(replace(job, output_format="webp"), video, None)
    with Image.open(io.BytesIO(webp)) as shown:
        assert shown.n_frames == 3
    assert file_of(a_job(), fake_image("p", 1, 4), None) == encode(fake_image("p", 1, 4), "png")


@pytest.mark.parametrize(
    ("steps", "wanted", "shown"),
    [(1, 3, ()), (2, 3, (0,)), (4, 1, (1,)), (4, 2, (0, 2)), (9, 4, (1, 3, 5, 7)), (4, 0, ())],
)
def test_previews_are_spread_over_the_steps_and_never_after_the_last(
    steps: int, wanted: int, shown: tuple[int, ...]
) -> None:
    assert preview_steps(steps, wanted) == shown


def test_late_scores_are_noted_with_the_times_of_the_calls_that_a_job_rode_in() -> None:
    def call(seconds: float, *jobs: int) -> Drawn:
        return Drawn(tuple(Slot(job, 0, "p", 0) for job in jobs), np.zeros((len(jobs), 3, 1, 1), np.float32), seconds)

    calls = [call(1.0, 0, 0, 1), call(2.0, 1), call(4.0, 2, 2, 2, 2)]
    timings = [late_scores._timing(calls, number) for number in (0, 1, 2, 3)]
    assert [(one.call_s, one.batch) for one in timings] == [(1.0, 3), (3.0, 3), (4.0, 4), (0, 0)]
    assert late_scores._bytes_of(calls) == 8 * 3 * 4
