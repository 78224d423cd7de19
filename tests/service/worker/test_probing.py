"""The golden probe in a worker: when it draws, what it says of a changed engine, and that real jobs come first."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.models.loaded import LoadedModels
from service.models.loader import probe_of
from service.worker.probing import AGAIN_S, PATIENCE_S, Prober
from service.worker.worker import Worker
from student.probe import PAIRS, Outcome, Probe, choose_pairs, measure
from student.runtimes.fake import FakeRuntime, fake_student
from student.runtimes.load import load
from student.runtimes.runtime import FloatArray, Runtime
from tests.service.students import change_engine, change_one_weight
from tests.service.support import Queue, eventually
from tests.service.worker.test_worker import Bench, Spy

HOUR_S = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bent(FakeRuntime):
    """An engine of which one value of every picture can be bent, and its scores with or without it."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.student = replace(fake_student(), id=model)
        self.bend, self.shift, self.fails = np.float32(0), 0.0, False

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        if self.fails:
            raise RuntimeError("the device is gone")
        images_BCHW = super().draw(prompts, seeds, steps)
        images_BCHW[:, 0, 0, 0] += self.bend
        return images_BCHW

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        return {name: score_B + np.float32(self.shift) for name, score_B in super().score(images_BCHW, prompts).items()}


class Setup:
    """A prober with one student on one kind of machine, at a time of the test's choice."""

    def __init__(self, queue: Queue, known_on: str | None, here: str = "here") -> None:
        self.clock = Clock()
        self.runtime = Bent(queue.model)
        pairs = choose_pairs(self.runtime.student, ["p", "q"])
        known = {"fake": {known_on: measure(self.runtime, pairs)}} if known_on else {}
        self.probe = Probe(self.runtime.student.fingerprint(), pairs, known)
        self.loaded = LoadedModels()
        self.loaded.put(self.runtime, 0.0, self.probe)
        consumer = queue.consumer("w")
        self.prober = Prober(self.loaded, consumer, HOUR_S, self.clock, lambda _: here)

    def whole(self) -> Any:
        """Draw a whole probe while nothing waits; returns what the worker says of it."""
        while run := self.prober.next(idle=True):
            if self.prober.draw(run):
                self.prober.settle(run, self.prober.take(run))
        return self.report()

    def report(self) -> Any:
        (about,) = self.loaded.info["models"].values()
        return about["probe"]


@pytest.fixture
def setup(queue: Queue) -> Callable[..., Setup]:
    return lambda known_on="here", here="here": Setup(queue, known_on, here)


def test_an_engine_that_is_what_it_was_is_the_same_hour_by_hour(setup: Callable[..., Setup]) -> None:
    one = setup()
    assert one.report() == {"outcome": "waiting"}
    assert one.whole()["outcome"] == Outcome.SAME and one.report()["source"] == "bundle"
    assert one.prober.next(idle=True) is None
    one.clock.now += HOUR_S
    assert one.whole()["outcome"] == Outcome.SAME and one.prober.counts == {"probe_same": 2}


def test_one_value_of_one_picture_is_caught_within_one_probe(
    setup: Callable[..., Setup], caplog: pytest.LogCaptureFixture
) -> None:
    one = setup()
    one.runtime.bend = np.float32(1e-6)
    with caplog.at_level(logging.INFO):
        assert one.whole()["outcome"] == Outcome.PIXELS_CHANGED
    assert [record.levelname for record in caplog.records if record.message == "probe: pixels_changed"] == ["ERROR"]
    one.runtime.bend, one.clock.now = np.float32(0), one.clock.now + HOUR_S
    assert one.whole()["outcome"] == Outcome.SAME


def test_a_scorer_that_changed_is_told_from_the_engine(setup: Callable[..., Setup]) -> None:
    one = setup()
    one.runtime.shift = 0.01
    assert one.whole()["outcome"] == Outcome.SCORES_CHANGED and one.report()["score_shift"] == pytest.approx(0.01)


def test_a_new_kind_of_machine_is_recorded_and_held_to_it_from_then_on(setup: Callable[..., Setup]) -> None:
    first, second = setup("elsewhere"), setup("elsewhere")
    for one in (first, second):
        one.runtime.bend = np.float32(1e-6)  # other bits than elsewhere, as another processor may give
    assert first.whole()["outcome"] == Outcome.RECORDED
    assert second.whole()["outcome"] == Outcome.SAME and second.report()["source"] == "recorded"
    second.runtime.bend, second.clock.now = np.float32(2e-6), second.clock.now + HOUR_S
    assert second.whole()["outcome"] == Outcome.PIXELS_CHANGED


def test_a_new_kind_of_machine_with_other_scores_is_not_trusted(setup: Callable[..., Setup]) -> None:
    one = setup("elsewhere")
    one.runtime.bend, one.runtime.shift = np.float32(1e-6), 0.06
    assert one.whole()["outcome"] == Outcome.SCORES_CHANGED
    one.runtime.shift, one.clock.now = 0.0, one.clock.now + HOUR_S
    assert one.whole()["outcome"] == Outcome.RECORDED  # nothing was kept of the bad one


def test_a_student_that_was_replaced_is_not_held_to_its_predecessor(setup: Callable[..., Setup]) -> None:
    old, new = setup(None), setup(None)
    new.probe = replace(new.probe, student="another")
    new.runtime.bend = np.float32(1e-6)
    new.loaded.put(new.runtime, 0.0, new.probe)
    assert (old.whole()["outcome"], new.whole()["outcome"]) == (Outcome.RECORDED, Outcome.RECORDED)


def test_a_runtime_is_held_to_what_the_same_runtime_has_drawn_and_to_no_other(setup: Callable[..., Setup]) -> None:
    """Two runtimes of one student on one kind of machine draw other bits, and neither is wrong."""
    for name, bend in (("fake", 0.0), ("other", 0.25)):
        one = setup(None)
        one.runtime.name, one.runtime.bend = name, np.float32(bend)
        assert one.whole()["outcome"] == Outcome.RECORDED
    again = setup(None)
    again.runtime.bend = np.float32(0.25)
    assert again.whole()["outcome"] == Outcome.PIXELS_CHANGED


def test_a_device_that_cannot_draw_the_probe_fails_it(setup: Callable[..., Setup]) -> None:
    one = setup()
    one.runtime.fails = True
    run = one.prober.next(idle=True)
    assert run is not None
    with pytest.raises(RuntimeError):
        one.prober.draw(run)
    one.prober.failed(run)
    assert one.report()["outcome"] == Outcome.FAILED and one.prober.next(idle=True) is None


def test_while_jobs_wait_a_probe_is_put_off_and_then_takes_one_call_a_minute(setup: Callable[..., Setup]) -> None:
    one = setup()
    drawn = 0
    for _ in range(3 * round(PATIENCE_S)):
        if run := one.prober.next(idle=False):
            one.prober.draw(run)
            drawn += 1
        one.clock.now += 1.0
    assert drawn == 2
    assert one.whole()["outcome"] == Outcome.SAME  # and it goes on where it was


def test_a_probe_that_becomes_due_while_jobs_wait_is_put_off_from_that_moment(setup: Callable[..., Setup]) -> None:
    one = setup()
    one.whole()
    one.clock.now += HOUR_S - 1.0
    assert one.prober.next(idle=False) is None, "it is not due"
    one.clock.now += 1.0
    assert one.prober.next(idle=False) is None, "jobs come first"
    one.clock.now += PATIENCE_S - 1.1
    assert one.prober.next(idle=False) is None
    one.clock.now += 0.2
    assert one.prober.next(idle=False) is not None


def test_without_a_queue_the_probe_is_drawn_again_soon(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis.exceptions import ConnectionError as RedisConnectionError

    one = setup(None)

    def away(*_: object) -> None:
        raise RedisConnectionError

    monkeypatch.setattr("service.queue.consumer.Consumer.probe_record", away)
    assert one.whole() == {"outcome": "waiting"}
    monkeypatch.undo()
    one.clock.now += AGAIN_S
    assert one.whole()["outcome"] == Outcome.RECORDED


def test_a_worker_probes_at_its_start_when_nothing_waits(queue: Queue, tmp_path: Path) -> None:
    import threading

    bench = Bench(queue, tmp_path / "results")
    runtime, loaded = Spy(queue.model), LoadedModels()
    pairs = choose_pairs(runtime.student, ["p"])
    loaded.put(runtime, 0.0, Probe(runtime.student.fingerprint(), pairs, {}))
    worker = Worker(loaded, bench.consumer, bench.heartbeat, bench.store, bench.stopping, probe_s=HOUR_S)
    thread = threading.Thread(target=worker.run)
    with bench.heartbeat:
        thread.start()
        try:
            report = lambda: loaded.info["models"][f"{queue.model}/1"]["probe"]["outcome"]  # noqa: E731
            eventually(lambda: report() == Outcome.RECORDED, "the probe is drawn")
            assert runtime.calls == [1] * PAIRS
            id = queue.add(prompt="real", seeds=(1,))
            eventually(lambda: queue.state(id) == "done", "jobs are drawn all the same")
            assert worker.counts()["probe_recorded"] == 1
        finally:
            bench.stopping.set()
            thread.join()


def test_one_changed_weight_of_a_compiled_student_is_caught_within_one_probe(
    compiled: Path, queue: Queue, tmp_path: Path
) -> None:
    bundle = tmp_path / "tiny"
    shutil.copytree(compiled, bundle)

    def outcome() -> Any:
        runtime = load(bundle, "onnx", 1)
        loaded = LoadedModels()
        probe = probe_of(bundle, runtime)
        assert probe is not None and set(probe.known) == {runtime.name}  # export.run has measured it
        loaded.put(runtime, 0.0, probe)
        prober = Prober(loaded, queue.consumer("w"), HOUR_S)
        while run := prober.next(idle=True):
            if prober.draw(run):
                prober.settle(run, prober.take(run))
        return loaded.info["models"][_name(runtime)]["probe"]["outcome"]

    assert outcome() == Outcome.SAME
    change_engine(bundle, change_one_weight)
    assert outcome() == Outcome.PIXELS_CHANGED


def _name(runtime: Runtime) -> str:
    return f"{runtime.student.id}/{runtime.student.version}"


def test_what_is_told_of_a_probe_and_where_it_was_compared_with(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.probing.time.time", lambda: 1234.9)
    told = {"at_s": 1234, "machine": "here"}
    one = setup()
    assert one.whole() == {"outcome": "same", "source": "bundle", "score_shift": 0.0, **told}
    one.runtime.shift, one.clock.now = -0.12344, one.clock.now + HOUR_S
    assert one.whole() == {"outcome": "scores_changed", "source": "bundle", "score_shift": 0.1234, **told}
    one.runtime.shift, one.clock.now = 1e9, one.clock.now + HOUR_S
    assert one.whole()["score_shift"] == 1e6, "a number that JSON and the page can show"
    one.runtime.fails = True
    one.clock.now += HOUR_S
    run = one.prober.next(idle=True)
    assert run is not None
    one.prober.failed(run)
    assert one.report() == {"outcome": "failed", "at_s": 1234}
    assert one.prober.counts == {"probe_same": 1, "probe_scores_changed": 2, "probe_failed": 1}
    fresh = setup(None)
    assert fresh.whole() == {"outcome": "recorded", "source": "recorded", "score_shift": 0.0, **told}


def test_a_worker_that_is_told_to_never_probes(setup: Callable[..., Setup]) -> None:
    one = setup()
    never = Prober(one.loaded, one.prober._consumer, 0.0, one.clock)
    one.clock.now += 1e9
    assert never.next(idle=True) is None and one.prober.next(idle=True) is not None


def test_of_several_students_the_one_that_is_due_for_longest_comes_first_and_one_that_left_not_at_all(
    setup: Callable[..., Setup],
) -> None:
    one = setup()
    first = one.prober.next(idle=True)
    assert first is not None
    one.clock.now += 5.0
    later = Bent("another")
    one.loaded.put(later, 0.0, replace(one.probe, student="another"))
    assert one.prober.next(idle=True) is first
    one.prober.take(first)
    second = one.prober.next(idle=True)
    assert second is not None and second.runtime is later and second.due_at == one.clock.now
    one.clock.now += HOUR_S - 1
    assert one.prober.next(idle=True) is second
    one.prober.take(second)
    assert one.prober.next(idle=True) is None
    one.clock.now += 1
    assert one.prober.next(idle=True) is first and first.due_at == one.clock.now
    reloaded = Bent(one.runtime.student.id)
    one.loaded.put(reloaded, 0.0, one.probe)
    fresh = one.prober.next(idle=True)
    assert fresh is not None and fresh.runtime is reloaded, "loaded again, it is probed again"
