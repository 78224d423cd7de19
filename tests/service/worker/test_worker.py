"""The worker, step by step, on a real queue: what it settles, with which bytes, and what it leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.queue.consumer import Consumer
from service.queue.job import Claimed
from service.results.folder import FolderStore
from service.results.store import ResultMissing
from service.worker.heartbeat import Heartbeat
from service.worker.worker import Worker
from student.runtimes.fake import FakeRuntime
from student.runtimes.runtime import FloatArray, Watch
from tests.service.support import PATIENCE_S, Queue, eventually, expected_pixels, pixels

LEASE_S = 0.6
AWAY = (RedisConnectionError("away"), RedisConnectionError("still away"))


class Spy(FakeRuntime):
    """The fake runtime under the name of a test's own queue; it counts calls and lets the test act in one."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.student = replace(self.student, id=model)
        self.calls: list[int] = []
        self.during: Callable[[], object] = lambda: None

    def draw_watched(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch) -> FloatArray:
        self.calls.append(len(prompts))
        self.during()
        return super().draw_watched(prompts, seeds, steps, watch)


def fail_first(
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    *failures: Exception,
    seen: Callable[[], object] = lambda: None,
) -> None:
    """Let the first calls of a method raise these, one each; ``seen`` is called before each further one."""
    call, left = getattr(owner, name), iter(failures)

    def sometimes(*arguments: Any, **options: Any) -> Any:
        if failure := next(left, None):
            raise failure
        seen()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, sometimes)


class Bench:
    """A worker and all that it needs."""

    def __init__(self, queue: Queue, folder: Path, **options: Any) -> None:
        self.queue = queue
        self.runtime = Spy(queue.model)
        self.store = FolderStore(folder)
        self.consumer = queue.consumer("w", lease_s=LEASE_S)
        beater = Consumer(queue.another_client(), queue.model, "w", lease_s=LEASE_S, max_attempts=3)
        self.heartbeat = Heartbeat(beater, {"runtime": "fake", "host": "h", "max_batch": 8}, LEASE_S / 6)
        self.stopping = threading.Event()
        self.worker = Worker(self.runtime, self.consumer, self.heartbeat, self.store, self.stopping, **options)
        self.folder = folder

    def dropped(self, id: str) -> str | None:
        """Why the heartbeat says that a job need not be gone on with."""
        return self.heartbeat.dropped(Claimed(id, str(self.queue.field(id, "token")), "", 1, 0.0))

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def check(self, id: str, prompt: str, seeds: Sequence[int]) -> dict[str, Any]:
        """The job is done, and with its own pictures."""
        assert self.queue.state(id) == "done"
        result = self.queue.result(id)
        assert [image["seed"] for image in result["images"]] == list(seeds)
        for image in result["images"]:
            assert np.array_equal(pixels(self.store.get(image["file"])), expected_pixels(prompt, image["seed"]))
        return result


@pytest.fixture
def bench(queue: Queue, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue, tmp_path / "results")
    with bench.heartbeat:
        yield bench


def test_a_job_is_drawn_scored_stored_and_settled(bench: Bench) -> None:
    id = bench.queue.add(prompt="a red heart", seeds=(5, 6))
    bench.worker.step()
    result = bench.check(id, "a red heart", (5, 6))
    assert (result["runtime"], result["batch_size"]) == ("fake", 2)
    assert set(result["timings"]) == {"queue_s", "inference_s", "score_s", "encode_s"}
    assert all(0 <= seconds < 60 for seconds in result["timings"].values())
    for image in result["images"]:
        own = FakeRuntime().draw(["a red heart"], [image["seed"]], 4)
        scores = FakeRuntime().score(own, ["a red heart"])
        assert image["reward"] == {name: float(score[0]) for name, score in scores.items()}
        assert (image["width"], image["height"]) == (64, 64)


def test_what_waits_rides_in_one_call_whatever_its_format(bench: Bench) -> None:
    jobs = {
        bench.queue.add(prompt=f"p{k}", seeds=(k, k + 9), output_format="png"): (f"p{k}", (k, k + 9)) for k in range(3)
    }
    other = bench.queue.add(prompt="q", output_format="webp")
    bench.worker.step()
    assert bench.runtime.calls == [7]
    results = [bench.check(id, prompt, seeds) for id, (prompt, seeds) in jobs.items()]
    assert {result["batch_size"] for result in results} == {7}
    assert bench.queue.result(other)["images"][0]["file"].endswith(".webp")


def test_each_call_is_told_once(bench: Bench) -> None:
    ids = [bench.queue.add() for _ in range(3)]
    bench.worker.step()
    report = [call["images"] for id in ids for call in bench.queue.result(id)["calls"]]
    assert report == [3] == bench.runtime.calls


def test_a_job_larger_than_a_batch_is_drawn_in_several(bench: Bench) -> None:
    id = bench.queue.add(prompt="many", seeds=tuple(range(10)))
    bench.worker.step()
    assert bench.runtime.calls == [5, 5] and bench.check(id, "many", range(10))["batch_size"] == 5


@pytest.mark.parametrize("trouble", ["fake:raise", "fake:nan"])
def test_a_job_that_fails_fails_alone(bench: Bench, trouble: str) -> None:
    good = [bench.queue.add(prompt="one", seeds=(1,)), bench.queue.add(prompt="two", seeds=(2, 3))]
    bad = bench.queue.add(prompt=trouble)
    bench.worker.step()
    bench.check(good[0], "one", (1,))
    bench.check(good[1], "two", (2, 3))
    assert bench.queue.state(bad) == "failed" and bench.queue.result(bad)["error"]["code"] == "generation_failed"
    assert trouble not in bench.queue.result(bad)["error"]["message"]


def test_a_score_that_is_no_number_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = np.array([np.nan], np.float32)
    monkeypatch.setattr(bench.runtime, "score", lambda *_: {"trained": nan, "heldout": np.ones(1, np.float32)})
    id = bench.queue.add(prompt="p", seeds=(1,))
    bench.worker.step()
    assert bench.check(id, "p", (1,))["images"][0]["reward"] == {"heldout": 1.0}


def test_a_failed_call_does_not_stop_the_worker(bench: Bench) -> None:
    bench.queue.add(prompt="fake:raise")
    bench.worker.step()
    id = bench.queue.add(prompt="next", seeds=(1,))
    bench.worker.step()
    bench.check(id, "next", (1,))


@pytest.mark.parametrize("payload", ["rubbish", "{}"])
def test_a_payload_that_cannot_be_read_fails_and_its_mate_does_not(bench: Bench, payload: str) -> None:
    bad, good = bench.queue.add(), bench.queue.add(prompt="good", seeds=(1,))
    bench.queue.client.hset(f"{bench.queue.prefix}j:{bad}", "payload", payload)
    bench.worker.step()
    assert bench.queue.state(bad) == "failed"
    bench.check(good, "good", (1,))


@pytest.mark.parametrize(("change", "words"), [({"steps": 3}, "3 steps"), ({"height": 32}, "64x32 pixels")])
def test_a_job_that_the_student_cannot_draw_is_refused(bench: Bench, change: dict[str, int], words: str) -> None:
    id = bench.queue.add(**change)
    bench.worker.step()
    assert bench.queue.state(id) == "failed" and words in bench.queue.result(id)["error"]["message"]
    assert bench.runtime.calls == []


def test_a_long_call_keeps_its_lease(bench: Bench) -> None:
    """The lease is renewed twice while the call lasts, so it could last for ever."""
    id = bench.queue.add(prompt="slow", seeds=(1,))
    renewals: set[float] = set()

    def until_renewed_twice() -> bool:
        renewals.add(bench.queue.client.zscore(f"{bench.queue.prefix}l", id) or 0.0)
        return len(renewals) > 2

    bench.runtime.during = lambda: eventually(until_renewed_twice, "the lease is renewed")
    bench.worker.step()
    bench.check(id, "slow", (1,))
    assert bench.queue.field(id, "attempts") == "1"


def test_a_job_that_is_cancelled_while_it_is_drawn_leaves_nothing(bench: Bench) -> None:
    id, mate = bench.queue.add(prompt="cancelled"), bench.queue.add(prompt="mate", seeds=(1,))
    cancelling = threading.Thread(
        target=lambda: bench.queue.client.hset(f"{bench.queue.prefix}j:{id}", "cancel", "cancelled")
    )

    def cancel() -> None:
        cancelling.start()
        eventually(lambda: bench.dropped(id), "the worker hears of it")

    bench.runtime.during = cancel
    bench.worker.step()
    cancelling.join()
    assert bench.queue.state(id) == "cancelled" and bench.queue.result
    bench.check(mate, "mate", (1,))
    assert len(bench.files()) == 1


def test_a_cancellation_that_comes_at_the_last_moment_leaves_nothing_either(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = bench.queue.add()
    put = bench.store.put

    def cancel_then_put(*arguments: Any) -> str:
        bench.queue.client.hset(f"{bench.queue.prefix}j:{id}", "cancel", "cancelled")
        return put(*arguments)

    monkeypatch.setattr(bench.store, "put", cancel_then_put)
    monkeypatch.setattr(bench.heartbeat, "dropped", lambda _: None)
    bench.worker.step()
    assert bench.queue.state(id) == "cancelled" and bench.files() == []


def test_a_zombie_leaves_the_heirs_picture_alone(bench: Bench) -> None:
    id = bench.queue.add(prompt="contested", seeds=(1,))
    heir = bench.queue.consumer("heir")

    def lose_the_job() -> None:
        bench.runtime.during = lambda: None
        heir.lost("w")
        [claimed] = heir.claim({bench.queue.lane: 8})
        reference = bench.store.put(id, claimed.token, "0", "png", b"the heir's")
        heir.finish(id, claimed.token, "done", {"images": [{"file": reference}]})

    bench.runtime.during = lose_the_job
    bench.worker.step()
    [image] = bench.queue.result(id)["images"]
    assert bench.store.get(image["file"]) == b"the heir's" and len(bench.files()) == 1
    assert bench.queue.notices() == [id]


def test_a_store_that_is_full_fails_the_job_and_not_the_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = bench.queue.add(seeds=(1, 2))
    put = bench.store.put

    def full(job: str, token: str, name: str, *rest: Any) -> str:
        if name == "1":
            raise OSError(28, "No space left on device")
        return put(job, token, name, *rest)

    monkeypatch.setattr(bench.store, "put", full)
    bench.worker.step()
    assert bench.queue.state(bad) == "failed" and bench.files() == []
    assert bench.queue.result(bad)["error"]["code"] == "storage_failed"
    monkeypatch.setattr(bench.store, "put", put)
    good = bench.queue.add(prompt="good", seeds=(1,))
    bench.worker.step()
    bench.check(good, "good", (1,))


def test_a_store_that_is_away_for_a_moment_is_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    id = bench.queue.add(prompt="patient", seeds=(1,))
    fail_first(monkeypatch, bench.store, "put", OSError("away"), OSError("still away"))
    bench.worker.step()
    bench.check(id, "patient", (1,))


def test_a_call_without_memory_is_halved_until_it_fits_and_nobody_fails(bench: Bench) -> None:
    ids = {bench.queue.add(prompt=f"{k} fake:oom", seeds=(k,)): k for k in range(7)}
    bench.worker.step()
    results = [bench.check(id, f"{k} fake:oom", (k,)) for id, k in ids.items()]
    assert bench.runtime.calls == [7, 3, 1, 2, 4, 2, 2]
    assert [call["splits"] for result in results for call in result["calls"]] == [2, 0, 1, 0]
    assert {result["batch_size"] for result in results} == {1, 2}
    again = bench.queue.add(prompt="8 fake:oom", seeds=tuple(range(4)))
    bench.runtime.calls.clear()
    bench.worker.step()
    assert bench.check(again, "8 fake:oom", range(4))["batch_size"] == 2
    assert bench.runtime.calls == [2, 2], "what fits is remembered from batch to batch: four are not tried"


def test_bytes_are_stored_before_the_job_is_done(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    id = bench.queue.add(seeds=(1, 2))
    finish = bench.consumer.finish
    stored: list[int] = []

    def look_then_finish(*arguments: Any, **options: Any) -> str:
        stored.append(len(bench.files()))
        return finish(*arguments, **options)

    monkeypatch.setattr(bench.consumer, "finish", look_then_finish)
    bench.worker.step()
    assert stored == [2] and bench.queue.state(id) == "done"


def test_a_server_that_is_away_for_a_while_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    id = bench.queue.add(prompt="patient", seeds=(1,))
    fail_first(monkeypatch, bench.consumer, "finish", *AWAY)
    bench.worker.step()
    bench.check(id, "patient", (1,))


def test_it_works_until_it_is_told_to_stop_and_then_ends_its_batch(bench: Bench) -> None:
    first, last = bench.queue.add(prompt="first", seeds=(1,)), bench.queue.add(prompt="last", seeds=(1,), steps=4)
    bench.runtime.during = bench.stopping.set
    bench.worker.run()
    bench.check(first, "first", (1,))
    bench.check(last, "last", (1,))
    later = bench.queue.add()
    bench.worker.run()
    assert bench.queue.state(later) == "queued"


def test_a_swept_picture_is_missing_not_wrong(bench: Bench) -> None:
    id = bench.queue.add()
    bench.worker.step()
    [image] = bench.queue.result(id)["images"]
    bench.store.sweep(-1)
    with pytest.raises(ResultMissing):
        bench.store.get(image["file"])


def test_the_queue_may_be_out_of_reach_between_two_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    id = bench.queue.add(prompt="patient", seeds=(1,))
    bench.runtime.during = bench.stopping.set
    fail_first(monkeypatch, bench.consumer, "claim", *AWAY)
    bench.worker.run()
    bench.check(id, "patient", (1,))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 1024",
        "std::bad_alloc",
    ],
)
def test_a_runtime_may_say_in_words_that_it_has_no_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    ids = {bench.queue.add(prompt=f"p{k}", seeds=(k,)): k for k in range(4)}
    draw = bench.runtime.draw_watched

    def small_calls_only(prompts: Sequence[str], *rest: Any) -> FloatArray:
        if len(prompts) > 2:
            raise RuntimeError(words)
        return draw(prompts, *rest)

    monkeypatch.setattr(bench.runtime, "draw_watched", small_calls_only)
    bench.worker.step()
    for id, k in ids.items():
        bench.check(id, f"p{k}", (k,))
    assert bench.runtime.calls == [2, 2], "halved, not drawn one by one"


def test_one_broken_pixel_of_the_last_image_breaks_its_job_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = bench.queue.add(prompt="bad", seeds=(1, 2)), bench.queue.add(prompt="good", seeds=(3,))
    draw = bench.runtime.draw_watched

    def break_one(*arguments: Any) -> FloatArray:
        images_BCHW = draw(*arguments)
        images_BCHW[1, 2, 63, 63] = np.inf
        return images_BCHW

    monkeypatch.setattr(bench.runtime, "draw_watched", break_one)
    bench.worker.step()
    assert bench.queue.state(bad) == "failed" and "not finite" in bench.queue.result(bad)["error"]["message"]
    bench.check(good, "good", (3,))
    assert len(bench.files()) == 1


def test_a_job_that_was_lost_and_comes_back_is_drawn(bench: Bench) -> None:
    """What was said of an earlier claim is not about this one."""
    id = bench.queue.add(prompt="again", seeds=(1,))

    def lose_it() -> None:
        bench.runtime.during = lambda: None
        assert bench.queue.consumer("another").lost("w") == 1
        eventually(lambda: bench.dropped(id), "the worker hears of it")

    bench.runtime.during = lose_it
    bench.worker.step()
    assert bench.queue.state(id) == "queued"
    bench.worker.step()
    bench.check(id, "again", (1,))
    assert bench.queue.field(id, "attempts") == "2" and len(bench.files()) == 1


def test_a_heartbeat_outlives_a_server_that_is_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[int] = []
    fail_first(monkeypatch, bench.heartbeat._consumer, "beat", *AWAY, seen=lambda: later.append(1))
    eventually(lambda: later, "it beats on")
    id = bench.queue.add(prompt="kept", seeds=(1,))
    bench.runtime.during = lambda: eventually(lambda: len(later) > 3)
    bench.worker.step()
    bench.check(id, "kept", (1,))


def test_a_lease_lasts_as_long_as_it_was_asked_for(bench: Bench) -> None:
    """By the server's clock, from the moment of the claim: exactly."""
    id = bench.queue.add()
    bench.queue.consumer("exact", lease_s=7.5).claim({bench.queue.lane: 1})
    claimed_us = int(str(bench.queue.field(id, "claimed_us")))
    assert bench.queue.client.zscore(f"{bench.queue.prefix}l", id) == claimed_us + 7_500_000


def test_a_job_that_was_given_up_is_not_stored_at_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was heard of after the last step."""
    id = bench.queue.add()
    draw, put = bench.runtime.draw_watched, bench.store.put
    stored: list[str] = []

    def draw_then_cancel(*arguments: Any, **options: Any) -> Any:
        images = draw(*arguments, **options)
        bench.queue.cancel(id)
        eventually(lambda: bench.dropped(id), "the worker hears of it")
        return images

    def note(job: str, *rest: Any) -> str:
        stored.append(job)
        return put(job, *rest)

    monkeypatch.setattr(bench.runtime, "draw_watched", draw_then_cancel)
    monkeypatch.setattr(bench.store, "put", note)
    bench.worker.step()
    assert bench.queue.state(id) == "cancelled" and stored == []


def test_a_job_that_is_given_up_while_it_is_scored_leaves_no_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is written meanwhile, slowly, and is removed once it is there."""
    id = bench.queue.add()
    score, put = bench.runtime.score, bench.store.put
    cancelled, stored = threading.Event(), list[str]()

    def cancel_then_score(*arguments: Any) -> Any:
        bench.queue.cancel(id)
        eventually(lambda: bench.dropped(id), "the worker hears of it")
        cancelled.set()
        return score(*arguments)

    def put_late(*arguments: Any) -> str:
        assert cancelled.wait(PATIENCE_S)
        time.sleep(0.3)
        stored.append(put(*arguments))
        return stored[-1]

    monkeypatch.setattr(bench.runtime, "score", cancel_then_score)
    monkeypatch.setattr(bench.store, "put", put_late)
    bench.worker.step()
    assert bench.queue.state(id) == "cancelled" and len(stored) == 1 and bench.files() == []
