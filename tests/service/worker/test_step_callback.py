"""Between two steps: who is dropped there, who is shown what, and that nobody's bytes change by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.queue.job import Claimed
from service.queue.rounds import first_round
from service.worker.batch import Batch
from service.worker.batching import Slot, preview_steps
from service.worker.execution import Stopped
from service.worker.step_callback import StepCallback
from student.runtimes.fake import FakeRuntime, fake_preview
from student.runtimes.runtime import Preview, Runtime, StepwiseRuntime
from tests.service.support import Queue, a_job, eventually, pixels
from tests.service.worker.test_worker import Bench


@pytest.fixture
def bench(queue: Queue, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue, tmp_path / "results")
    with bench.heartbeat:
        yield bench


@pytest.mark.parametrize(
    ("steps", "wanted", "shown"),
    [
        (1, 3, ()), (2, 3, (0,)), (3, 3, (0, 1)), (4, 0, ()), (4, 1, (1,)), (4, 2, (0, 2)), (4, 3, (0, 1, 2)),
        (8, 3, (1, 3, 5)), (50, 2, (12, 36)),
    ],
)  # fmt: skip
def test_looks_are_spread_over_the_steps(steps: int, wanted: int, shown: tuple[int, ...]) -> None:
    assert preview_steps(steps, wanted) == shown


def test_the_fake_runtime_shows_its_steps_and_draws_the_same_when_watched() -> None:
    runtime: Runtime = FakeRuntime()
    assert isinstance(runtime, StepwiseRuntime)
    seen: list[int] = []

    def watch(step: int, preview: Preview) -> None:
        seen.append(step)
        images_BCHW = preview([1])
        assert images_BCHW.shape == (1, 3, 64, 64) and images_BCHW.dtype == np.float32
        assert np.array_equal(images_BCHW[0], fake_preview("b", 2, 4, step))

    watched = runtime.draw_watched(["a", "b"], [1, 2], 4, watch)
    assert seen == [0, 1, 2] and np.array_equal(watched, runtime.draw(["a", "b"], [1, 2], 4))


def test_previews_are_what_the_runtime_predicts_and_only_for_whoever_asked(bench: Bench) -> None:
    plain = bench.queue.add(prompt="plain", seeds=(1,))
    id = bench.queue.add(prompt="watched", seeds=(5, 6), previews=3)
    once = bench.queue.add(prompt="once", seeds=(7,), previews=1)
    bench.worker.step()
    assert bench.runtime.calls == [4], "previews do not split a batch"
    previews = bench.queue.record(id).previews
    assert set(previews) == {f"{i}:{k}" for i in range(3) for k in range(2)}
    for name, file in previews.items():
        step, image = map(int, name.split(":"))
        expected = np.rint(fake_preview("watched", 5 + image, 4, step) * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(pixels(bench.store.get(file)), expected)
    [(name, file)] = bench.queue.record(once).previews.items()
    expected = np.rint(fake_preview("once", 7, 4, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert name == "0:0" and np.array_equal(pixels(bench.store.get(file)), expected)
    assert bench.queue.record(plain).previews == {}
    for done, prompt, seeds in ((plain, "plain", (1,)), (id, "watched", (5, 6)), (once, "once", (7,))):
        bench.check(done, prompt, seeds)


def test_a_job_that_is_larger_than_a_batch_is_shown_whole(bench: Bench) -> None:
    id = bench.queue.add(prompt="many", seeds=tuple(range(10)), previews=1)
    bench.worker.step()
    previews = bench.queue.record(id).previews
    assert set(previews) == {f"0:{k}" for k in range(10)}
    expected = np.rint(fake_preview("many", 9, 4, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels(bench.store.get(previews["0:9"])), expected)


@pytest.mark.parametrize("why", ["cancelled", "expired"])
def test_a_job_is_dropped_at_the_next_step_and_the_call_ends_with_its_last_job(bench: Bench, why: str) -> None:
    id = bench.queue.add(prompt="unwanted", previews=3)
    seen: list[int] = []
    original = bench.runtime.draw_watched

    def draw_watched(prompts, seeds, steps, watch):  # type: ignore[no-untyped-def]
        def watch_and_cancel(step: int, preview: Preview) -> None:
            seen.append(step)
            if step == 0:
                bench.queue.cancel(id, why)  # type: ignore[arg-type]
            watch(step, preview)
            eventually(lambda: bench.dropped(id), "the step lasts until the news has come")

        return original(prompts, seeds, steps, watch_and_cancel)

    put, written = bench.store.put, threading.Event()

    def put_slowly(*arguments: Any) -> str:
        time.sleep(0.3)  # the preview of the first step is still being written when the job is given up
        reference = put(*arguments)
        written.set()
        return reference

    bench.store.put = put_slowly  # type: ignore[method-assign]
    bench.runtime.draw_watched = draw_watched  # type: ignore[method-assign]
    bench.worker.step()
    assert seen == [0, 1], "the third step was not begun"
    assert written.wait(5), "the preview has been written"
    assert bench.queue.state(id) == why and bench.files() == [] and bench.queue.notices() == [id]


def test_a_dropped_job_has_ended_before_its_mates_are_drawn(bench: Bench) -> None:
    id, mate = bench.queue.add(prompt="unwanted"), bench.queue.add(prompt="mate", seeds=(3,))
    states: list[str] = []
    original = bench.runtime.draw_watched

    def draw_watched(prompts, seeds, steps, watch):  # type: ignore[no-untyped-def]
        def watch_and_cancel(step: int, preview: Preview) -> None:
            if step == 0:
                bench.queue.cancel(id)
            if step == 2:
                eventually(lambda: bench.queue.state(id) == "cancelled", "it has ended")
            watch(step, preview)
            if step == 0:
                eventually(lambda: bench.dropped(id), "the step lasts until the news has come")
            states.append(bench.queue.state(id))

        return original(prompts, seeds, steps, watch_and_cancel)

    bench.runtime.draw_watched = draw_watched  # type: ignore[method-assign]
    bench.worker.step()
    assert states[2] == "cancelled"
    bench.check(mate, "mate", (3,))
    assert len(bench.files()) == 1 and sorted(bench.queue.notices()) == sorted([id, mate])


def test_a_batch_that_fails_is_tried_again_with_the_right_previews_for_each(bench: Bench) -> None:
    bad = bench.queue.add(prompt="fake:raise")
    good = bench.queue.add(prompt="good", seeds=(4,), previews=1)
    bench.worker.step()
    [file] = bench.queue.record(good).previews.values()
    expected = np.rint(fake_preview("good", 4, 4, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels(bench.store.get(file)), expected) and bench.queue.state(bad) == "failed"
    bench.check(good, "good", (4,))


def test_after_each_step_news_are_asked_for_and_videos_tell_how_far_they_are() -> None:
    """Of four jobs of one call: a picture with a preview, a video, one that is cancelled, one that was lost."""
    jobs = [a_job(previews=1), a_job(frames=5), a_job(frames=5), a_job()]
    claimed = tuple(Claimed(job.id, "17", "", 1, 0.0) for job in jobs)
    batch = Batch(FakeRuntime(), claimed, tuple(map(first_round, jobs)))
    done, dropped = list[Any](), dict[str, str]()
    heartbeat: Any = SimpleNamespace(ask=lambda: done.append("ask"), dropped=lambda one: dropped.get(one.id))
    finisher: Any = SimpleNamespace(
        advance=lambda of, number, steps: done.append(("advance", number, steps)),
        show=lambda of, number, preview, index, image: done.append(("show", number, preview, index, image)),
        give_up=lambda of, number: done.append(("give up", number)),
    )  # fmt: skip
    callback = StepCallback(batch, heartbeat, finisher)
    slots = [Slot(number, 0, "p", 7) for number in range(4)]

    def after(step: int) -> list[Any]:
        done.clear()
        callback(slots, step, lambda rows: [f"row {row}" for row in rows])  # type: ignore[arg-type, return-value]
        return list(done)

    assert after(0) == ["ask", ("advance", 1, 1), ("advance", 2, 1)]
    dropped |= {jobs[2].id: "cancelled", jobs[3].id: "lost"}
    assert after(1) == ["ask", ("give up", 2), ("show", 0, 0, 0, "row 0"), ("advance", 1, 2)]
    assert after(2) == ["ask", ("advance", 1, 3)], "it is given up once"
    dropped |= {jobs[0].id: "expired", jobs[1].id: "lost"}
    with pytest.raises(Stopped):
        after(2)
    assert done == ["ask", ("give up", 0)] and callback.ended == {0, 2}, "what was lost is another worker's"
