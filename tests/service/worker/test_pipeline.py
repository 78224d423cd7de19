"""The worker as a pipeline: what overlaps, what waits for what, and what becomes of jobs when a part of it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.worker.backlog import Backlog
from service.worker.device import Device
from service.worker.execution import DeviceLost
from service.worker.watchdog import FIRST_BOUND_S, SHORTEST_BOUND_S, TIMES_USUAL, Bounds, Watchdog
from student.runtimes.runtime import FloatArray
from tests.service.support import Queue, eventually
from tests.service.worker.test_worker import Bench, fail_first

SHAPE = ("m", "1", 64, 64, 4)


@pytest.fixture
def bench(queue: Queue, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue, tmp_path / "results")
    with bench.heartbeat:
        yield bench


@contextmanager
def running(bench: Bench) -> Iterator[threading.Thread]:
    """The worker at work in a thread of its own, until the context ends."""
    thread = threading.Thread(target=bench.worker.run, name="drawing")
    thread.start()
    try:
        yield thread
    finally:
        bench.stopping.set()
        thread.join()


def all_done(bench: Bench, ids: Sequence[str]) -> bool:
    return all(bench.queue.state(id) == "done" for id in ids)


def test_the_next_batch_is_claimed_while_the_device_draws_and_never_more_than_one(bench: Bench) -> None:
    """Three batches of eight wait; in the middle of the first the second is held, and the third still waits."""
    ids = [bench.queue.add(prompt=f"p{k}", seeds=(k,)) for k in range(24)]
    held: list[int] = []

    def until_the_next_is_held() -> None:
        bench.runtime.during = lambda: None
        eventually(lambda: bench.queue.client.zcard(f"{bench.queue.prefix}l") == 16, "the second batch is held")
        time.sleep(0.2)
        held.append(bench.queue.client.zcard(f"{bench.queue.prefix}l"))

    bench.runtime.during = until_the_next_is_held
    with running(bench):
        eventually(lambda: all_done(bench, ids), "all are drawn")
    assert held == [16] and bench.runtime.calls == [8, 8, 8]


def test_pictures_are_stored_while_they_are_scored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, and under its own number."""
    id = bench.queue.add(prompt="p", seeds=(3, 4, 5))
    score, put, stored = bench.runtime.score, bench.store.put, list[str]()

    def score_once_stored(*arguments: Any) -> Any:
        eventually(lambda: len(stored) == 3, "they are stored before the scorer answers")
        return score(*arguments)

    def note(job: str, token: str, name: str, *rest: Any) -> str:
        reference = put(job, token, name, *rest)
        stored.append(name)
        return reference

    monkeypatch.setattr(bench.runtime, "score", score_once_stored)
    monkeypatch.setattr(bench.store, "put", note)
    bench.worker.step()
    result = bench.check(id, "p", (3, 4, 5))
    assert sorted(stored) == ["0", "1", "2"] and all(image["reward"] for image in result["images"])
    assert result["timings"]["encode_s"] > 0


def test_a_picture_that_could_not_be_stored_meanwhile_is_stored_afterwards(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = bench.queue.add(prompt="p", seeds=(3,))
    fail_first(monkeypatch, bench.store, "put", OSError(28, "No space left on device"))
    bench.worker.step()
    bench.check(id, "p", (3,))


def test_whoever_takes_a_batch_has_the_device_from_that_moment(bench: Bench) -> None:
    """Else the next one would be claimed at once, half empty, and not shortly before the device is free."""
    id = bench.queue.add(prompt="p", seeds=(1,))
    with bench.worker.claims as claims:
        batch = claims.next(20.0)
        assert batch is not None and [job.id for job in batch.jobs] == [id]
        assert not bench.worker.device.idle
    bench.worker.device.end()


def test_a_job_that_was_lost_with_a_worker_is_drawn_with_nothing_unsettled_in_the_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect = bench.queue.add(prompt="suspect", seeds=(1,))
    lost = bench.queue.consumer("lost")
    assert len(lost.claim({bench.queue.lane: 8})) == 1
    first, put, calls = bench.queue.add(prompt="first", seeds=(2,)), bench.store.put, list[int]()

    def put_slowly(job: str, *rest: Any) -> str:
        if job == first:
            assert bench.queue.consumer("w2").lost("lost") == 1
            time.sleep(0.5)
            calls.append(len(bench.runtime.calls))
        return put(job, *rest)

    monkeypatch.setattr(bench.store, "put", put_slowly)
    with running(bench):
        eventually(lambda: all_done(bench, [first, suspect]), "both are drawn")
    assert calls == [1] and bench.runtime.calls == [1, 1]


def test_the_device_is_counted_in_milliseconds(bench: Bench) -> None:
    bench.queue.add(prompt="fake:sleep=0.2", seeds=(1,))
    bench.worker.step()
    assert 200 <= bench.worker.counts()["device_busy_ms"] < 60_000


def test_the_drawing_thread_never_talks_to_the_queue_or_the_store(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: dict[str, set[str]] = {}

    def note(of: object, name: str) -> None:
        original: Callable[..., Any] = getattr(of, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            callers.setdefault(name, set()).add(threading.current_thread().name)
            return original(*arguments, **options)

        monkeypatch.setattr(of, name, noted)

    note(bench.queue.client.connection_pool, "get_connection")
    note(bench.heartbeat._consumer._client.connection_pool, "get_connection")
    for name in ("put", "discard"):
        note(bench.store, name)
    note(bench.runtime, "score")
    with running(bench):
        ids = [bench.queue.add(prompt=f"p{k}", seeds=(k, k + 50), previews=2) for k in range(9)]
        eventually(lambda: all_done(bench, ids), "all are drawn")
    assert set(callers) == {"get_connection", "put", "score"}
    assert all("drawing" not in names for names in callers.values()), callers


def test_the_device_draws_on_while_the_last_batch_is_encoded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [bench.queue.add(prompt=f"a{k}", seeds=(k,)) for k in range(8)]
    second = [bench.queue.add(prompt=f"b{k}", seeds=(k,)) for k in range(8)]
    put, drawn_twice = bench.store.put, threading.Event()

    def put_when_the_second_is_drawn(job: str, *rest: Any) -> str:
        if job in first:
            assert drawn_twice.wait(20), "the second batch is drawn meanwhile"
        return put(job, *rest)

    monkeypatch.setattr(bench.store, "put", put_when_the_second_is_drawn)
    bench.runtime.during = lambda: len(bench.runtime.calls) == 2 and drawn_twice.set()
    with running(bench):
        eventually(lambda: all_done(bench, first + second), "all are drawn")


def test_a_job_is_settled_as_soon_as_its_own_pictures_are_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = bench.queue.add(prompt="slow", seeds=(1,)), bench.queue.add(prompt="fast", seeds=(2,))
    put = bench.store.put

    def put_slowly(job: str, *rest: Any) -> str:
        if job == slow:
            eventually(lambda: bench.queue.state(fast) == "done", "its mate does not wait for it")
        return put(job, *rest)

    monkeypatch.setattr(bench.store, "put", put_slowly)
    bench.worker.step()
    bench.check(slow, "slow", (1,))
    bench.check(fast, "fast", (2,))


def test_a_stop_hands_back_the_batch_ahead_and_no_attempt_is_counted(bench: Bench) -> None:
    drawn = [bench.queue.add(prompt=f"p{k}", seeds=(k,)) for k in range(8)]
    ahead = bench.queue.add(prompt="ahead", seeds=(9,))

    def stop_when_it_is_held() -> None:
        eventually(lambda: bench.queue.state(ahead) == "running", "it is claimed ahead")
        bench.stopping.set()

    bench.runtime.during = stop_when_it_is_held
    bench.worker.run()
    assert all_done(bench, drawn) and bench.runtime.calls == [8]
    assert (bench.queue.state(ahead), bench.queue.field(ahead, "attempts")) == ("queued", "0")
    assert not bench.heartbeat.held()


def test_a_batch_ahead_of_a_call_that_is_late_goes_to_another_worker(bench: Bench) -> None:
    """Nobody knows how long the call will take: whoever is free shall draw it meanwhile."""
    long, ahead = bench.queue.add(prompt="long", seeds=tuple(range(8))), bench.queue.add(prompt="ahead", seeds=(1,))
    states: list[str] = []

    def until_handed_back() -> None:
        bench.runtime.during = lambda: None
        eventually(lambda: bench.queue.state(ahead) == "running", "it is claimed ahead")
        eventually(lambda: bench.queue.state(ahead) == "queued", "it is handed back")
        time.sleep(0.5)
        states.append(bench.queue.state(ahead))

    bench.runtime.during = until_handed_back
    with running(bench):
        eventually(lambda: all_done(bench, [long, ahead]), "both are drawn")
    assert states == ["queued"] and bench.queue.field(ahead, "attempts") == "1"


def test_a_device_that_fails_at_everything_costs_no_job_an_attempt_and_ends_the_worker(bench: Bench) -> None:
    good = bench.queue.add(prompt="before", seeds=(1,))
    bench.worker.step()
    jobs = [bench.queue.add(prompt=f"p{k}", seeds=(k,)) for k in range(3)]

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.runtime.during = fail
    with pytest.raises(DeviceLost):
        bench.worker.step()
    bench.check(good, "before", (1,))
    for id in jobs:
        assert (bench.queue.state(id), bench.queue.field(id, "attempts")) == ("queued", "0")
        assert str(bench.queue.field(id, "bucket")).endswith("|solo"), "it may have been the reason: it travels alone"
    assert bench.runtime.calls == [1, 3, 1, 1], "the batch, the first job alone, and the warm-up picture; no more"


def test_a_job_that_takes_the_device_with_it_is_given_up_in_the_end(bench: Bench) -> None:
    """Spared as often as there are attempts, and then counted like one that kills its worker."""
    poison = bench.queue.add(prompt="poison", seeds=(1,))

    def fail() -> None:
        raise RuntimeError("CUDA error")

    bench.runtime.during = fail
    for _ in range(2 * 3):
        assert bench.queue.state(poison) == "queued"
        with pytest.raises(DeviceLost):
            bench.worker.step()
    assert bench.queue.state(poison) == "failed"
    assert bench.queue.result(poison)["error"]["code"] == "worker_lost"


def test_a_scorer_that_raises_costs_no_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises on every third picture: those have no score, all others have theirs."""
    score = bench.runtime.score

    def on_every_third(images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        if any(int(prompt[1:]) % 3 == 2 for prompt in prompts):
            raise ValueError("a user's own code")
        return score(images_BCHW, prompts)

    monkeypatch.setattr(bench.runtime, "score", on_every_third)
    ids = [bench.queue.add(prompt=f"p{k}", seeds=(k,)) for k in range(8)]
    bench.worker.step()
    rewards = [bench.check(id, f"p{k}", (k,))["images"][0]["reward"] for k, id in enumerate(ids)]
    assert [bool(reward) for reward in rewards] == [k % 3 != 2 for k in range(8)]
    assert bench.runtime.calls == [8], "nothing is drawn again for it"
    failed = [bench.queue.result(id)["images"][0].get("reward_failed") for id in ids]
    assert failed == [None if k % 3 != 2 else ["trained", "heldout"] for k in range(8)]


@pytest.mark.parametrize("stopping", [False, True])
def test_an_unknown_end_never_costs_a_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch, stopping: bool) -> None:
    """The server ends the job, and its answer is lost for good: the record points at pictures that are there."""
    id = bench.queue.add(prompt="p", seeds=(1,))
    finish = bench.consumer.finish

    def finish_and_lose_the_answer(*arguments: Any, **options: Any) -> str:
        finish(*arguments, **options)
        if stopping:
            bench.stopping.set()
        raise RedisConnectionError("the answer is lost")

    monkeypatch.setattr(bench.consumer, "finish", finish_and_lose_the_answer)
    monkeypatch.setattr("service.worker.settling.SETTLE_FOR_S", 0.5)
    bench.worker.step()
    bench.check(id, "p", (1,))


def test_an_answer_that_cannot_be_read_never_costs_a_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends the job, and its answer is such that the worker fails: what it then reports comes too late."""
    id = bench.queue.add(prompt="p", seeds=(1,))
    finish, answers = bench.consumer.finish, list[str]()

    def finish_and_fail_once(*arguments: Any, **options: Any) -> str:
        answers.append(finish(*arguments, **options))
        if len(answers) == 1:
            raise ValueError("nobody thought of such an answer")
        return answers[-1]

    monkeypatch.setattr(bench.consumer, "finish", finish_and_fail_once)
    bench.worker.step()
    bench.check(id, "p", (1,))
    assert answers == ["done", "done"], "the second was to say that it has failed"


def test_a_stopping_worker_still_settles_what_it_drew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is away just then: it is asked again, stopping or not."""
    id = bench.queue.add(prompt="p", seeds=(1,))
    finish = bench.consumer.finish
    failures = iter([RedisConnectionError("away"), RedisConnectionError("still away")])

    def sometimes(*arguments: Any, **options: Any) -> str:
        bench.stopping.set()
        if failure := next(failures, None):
            raise failure
        return finish(*arguments, **options)

    monkeypatch.setattr(bench.consumer, "finish", sometimes)
    bench.worker.step()
    bench.check(id, "p", (1,))


def test_a_part_that_fails_in_an_unknown_way_fails_its_job_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = bench.queue.add(prompt="bad", seeds=(1,)), bench.queue.add(prompt="good", seeds=(2,))
    put = bench.store.put

    def fail(job: str, *rest: Any) -> str:
        if job == bad:
            raise TypeError("nobody thought of this")
        return put(job, *rest)

    monkeypatch.setattr(bench.store, "put", fail)
    bench.worker.step()
    bench.check(good, "good", (2,))
    assert bench.queue.state(bad) == "failed" and not bench.heartbeat.held()


def test_claiming_goes_on_after_a_failure_of_any_kind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = TypeError("nobody thought of this"), KeyError("nor of this")
    fail_first(monkeypatch, bench.consumer, "claim", *failures)
    id = bench.queue.add(prompt="p", seeds=(1,))
    with running(bench):
        eventually(lambda: bench.queue.state(id) == "done", "it is drawn")


def test_the_heartbeat_goes_on_after_a_failure_of_any_kind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[int] = []
    failure = TypeError("nobody thought of this")
    fail_first(monkeypatch, bench.heartbeat._consumer, "beat", failure, seen=lambda: later.append(1))
    eventually(lambda: len(later) > 2, "it beats on")


def test_a_call_that_hangs_is_noticed_within_its_bound_and_once() -> None:
    hung: list[str] = []
    with Watchdog(hung.append) as watchdog:
        with watchdog.watching("a short call", 20.0):
            pass
        started = time.monotonic()
        with watchdog.watching("a call", 0.3):
            eventually(lambda: hung, "it is noticed")
            waited_s = time.monotonic() - started
            time.sleep(0.3)
    assert hung == ["a call"] and waited_s >= 0.3


def test_a_call_that_hangs_is_noticed_though_others_begin_and_end_beside_it() -> None:
    """A scorer and the network are called side by side."""
    hung = list[str]()
    with Watchdog(hung.append) as watchdog, watchdog.watching("a scorer", 600.0):
        with watchdog.watching("a call", 0.2), watchdog.watching("another", 600.0):
            with watchdog.watching("a short call", 600.0):
                pass
            eventually(lambda: hung, "it is noticed")
    assert hung == ["a call"]


def test_a_bound_is_the_setting_or_many_times_what_was_measured() -> None:
    device = Device()
    bounds = Bounds(device)
    assert bounds.of(SHAPE, 1) == bounds.longest_s == FIRST_BOUND_S
    device.measured(SHAPE, 1, 0.01)
    assert bounds.of(SHAPE, 1) == SHORTEST_BOUND_S
    device.measured(SHAPE, 4, 30.0)
    assert bounds.of(SHAPE, 4) == TIMES_USUAL * 30.0
    assert bounds.of(SHAPE, 8) == TIMES_USUAL * 60.0, "scaled from the nearest"
    assert bounds.of(SHAPE, 3) == TIMES_USUAL * 30.0, "fewer may take as long"
    assert Bounds(device, setting_s=5.0).of(SHAPE, 4) == Bounds(device, setting_s=5.0).longest_s == 5.0


def test_a_call_whose_like_was_never_measured_may_take_many_times_the_longest_warm_up(bench: Bench) -> None:
    bounds = bench.worker._bounds
    assert bounds.longest_s == FIRST_BOUND_S
    bench.runtime.warm_up_s = 100.0
    assert bounds.longest_s == bounds.of(SHAPE, 1) == TIMES_USUAL * 100.0


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_device_is_starved_only_while_work_waits() -> None:
    clock = Clock()
    device = Device(clock)
    clock.now = 110.0
    device.begin(SHAPE, 1, waiting_since=108.0)  # idle since 100, but the job came at 108
    clock.now = 113.0
    device.end()
    assert (device.usage.busy_s, device.usage.starved_s) == (3.0, 2.0)
    clock.now = 114.0
    device.begin(SHAPE, 1, waiting_since=105.0)  # it had waited all the while: idle for 1 s
    clock.now = 115.5
    assert (device.usage.busy_s, device.usage.starved_s) == (4.5, 3.0), "the call that runs counts"
    device.end()
    device.begin(SHAPE, 1, waiting_since=115.5)
    assert device.usage.starved_s == 3.0


def test_a_call_is_predicted_by_the_running_mean_of_its_like() -> None:
    device = Device()
    assert device.predicted_s(SHAPE, 2) is None
    device.measured(SHAPE, 2, 1.0)
    device.measured(SHAPE, 2, 2.0)
    assert device.predicted_s(SHAPE, 2) == pytest.approx(1.3)
    assert device.predicted_s(SHAPE, 4) == pytest.approx(2.6) and device.predicted_s(SHAPE, 1) == pytest.approx(1.3)
    assert device.predicted_s(("other", "1", 64, 64, 4), 2) is None


def test_the_device_counts_as_late_when_it_draws_twice_as_long_as_predicted() -> None:
    clock = Clock()
    device = Device(clock)
    device.measured(SHAPE, 1, 10.0)
    device.begin(SHAPE, 1, clock.now)
    clock.now += 19.0
    assert not device.late and device.wait_until_free(0.0, 0.0), "over its time, so free at any moment"
    clock.now += 2.0
    assert device.late and not device.wait_until_free(0.0, 0.0)


def test_the_backlog_bounds_bytes_and_batches_but_takes_the_first_whatever_its_size() -> None:
    backlog, added = Backlog(most_bytes=10, most_batches=2), list[int]()

    def add(num_bytes: int) -> threading.Thread:
        thread = threading.Thread(target=lambda: (backlog.add(num_bytes), added.append(num_bytes)))
        thread.start()
        return thread

    add(50).join()
    waiting = add(1)
    time.sleep(0.1)
    assert added == [50] and not backlog.wait_until_empty(0.0)
    backlog.remove(50)
    waiting.join()
    add(1).join()
    third = add(1)
    time.sleep(0.1)
    assert added == [50, 1, 1], "no third batch, however small"
    for _ in range(3):
        backlog.remove(1)
    third.join()
    assert backlog.wait_until_empty(5.0)


def test_broken_values_fail_their_job_though_a_scorer_saw_them(bench: Bench) -> None:
    id = bench.queue.add(prompt="fake:nan", seeds=(1,))
    bench.worker.step()
    assert bench.queue.state(id) == "failed" and np.isfinite(bench.worker.counts()["device_busy_ms"])
