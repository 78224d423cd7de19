"""FEWSTEP_SCORE=after: no answer waits for its scores; they come once, are bounded, and die with their worker alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.worker.late_scores import LateScores
from service.worker.scoring import ScorePolicy
from student.runtimes.fake import FakeRuntime, fake_image
from tests.service.http.test_events import listen
from tests.service.late import answered, check_each_once, load, settled
from tests.service.observe.test_metrics import NAMED, read, value
from tests.service.support import PATIENCE_S, Queue, call, check_answer, eventually, post, running_service
from tests.service.worker.test_worker import Bench

AFTER = ScorePolicy.parse("after")


@pytest.fixture
def bench(queue: Queue, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue, tmp_path / "results", policy=AFTER)
    with bench.heartbeat:
        yield bench


class Gate:
    """Scorers that wait until the test opens them."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.asked: list[int] = []
        score = bench.runtime.score

        def wait(images_BCHW: Any, prompts: Sequence[str]) -> Any:
            self.asked.append(len(prompts))
            assert self.opened.wait(PATIENCE_S)
            return score(images_BCHW, prompts)

        monkeypatch.setattr(bench.runtime, "score", wait)


def expected(prompt: str, seed: int) -> dict[str, float]:
    scores = FakeRuntime().score(fake_image(prompt, seed, 4)[None], [prompt])
    return {name: float(score[0]) for name, score in scores.items()}


def draw_one_batch(bench: Bench) -> None:
    batch = bench.worker.claims.claim()
    assert batch is not None
    bench.worker._draw(batch)


def test_jobs_are_done_while_the_scorers_have_not_begun_and_have_their_own_scores_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(bench, monkeypatch)
    jobs = {bench.queue.add(prompt=f"p{k}", seeds=(k, k + 50)): k for k in range(3)}
    draw_one_batch(bench)
    eventually(lambda: all(bench.queue.state(id) == "done" for id in jobs), "all are done")
    for id in jobs:
        record = bench.queue.record(id)
        assert record.scoring == "pending" and [image["reward"] for image in record.result["images"]] == [{}, {}]
    assert not bench.worker.drain(0.05)
    gate.opened.set()
    assert bench.worker.drain(PATIENCE_S) and gate.asked == [6]
    for id, k in jobs.items():
        record = bench.queue.record(id)
        assert record.scoring == "done" and record.result["timings"]["score_s"] > 0
        rewards = [image["reward"] for image in record.result["images"]]
        assert rewards == [expected(f"p{k}", seed) for seed in (k, k + 50)]
    assert sorted(bench.queue.notices_of("score")) == sorted(jobs) and bench.heartbeat.held() == []


def test_slow_scorers_keep_their_time_by_the_heartbeat(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is 0.6 s."""
    gate, id = Gate(bench, monkeypatch), bench.queue.add(prompt="p", seeds=(1,))
    draw_one_batch(bench)
    eventually(lambda: bench.queue.state(id) == "done")
    bench.queue.let_deadlines_pass("sc")
    key = f"{bench.queue.prefix}sc"
    eventually(lambda: (bench.queue.client.zscore(key, id) or 0) > 1, "the time is renewed")
    assert bench.queue.record(id).scoring == "pending"
    gate.opened.set()
    bench.worker.drain()
    assert bench.queue.record(id).scoring == "done"


def test_what_waits_for_its_scores_is_bounded_and_beyond_they_are_skipped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.worker._finisher, "_late", LateScores(
        bench.consumer, bench.heartbeat, bench.worker._guard_scorer, AFTER, most_waiting=2
    ))  # fmt: skip
    gate, ids = Gate(bench, monkeypatch), []
    for k in range(4):
        ids.append(bench.queue.add(prompt=f"p{k}", seeds=(k,)))
        draw_one_batch(bench)
        eventually(lambda: bench.queue.state(ids[-1]) == "done", "no answer waits")
    assert [bench.queue.record(id).scoring for id in ids] == ["pending", "pending", "skipped", "skipped"]
    gate.opened.set()
    bench.worker.drain()
    assert [bench.queue.record(id).scoring for id in ids] == ["done", "done", "skipped", "skipped"]
    last = bench.queue.add(prompt="last", seeds=(9,))
    bench.worker.step()
    assert bench.queue.record(last).scoring == "done", "there is room again"


def test_failed_and_dropped_jobs_cost_the_scorers_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(bench, monkeypatch)
    gate.opened.set()
    good, broken = bench.queue.add(prompt="good", seeds=(1, 2)), bench.queue.add(prompt="fake:nan", seeds=(3,))
    dropped = bench.queue.add(prompt="dropped", seeds=(4,))
    bench.runtime.during = lambda: bench.queue.cancel(dropped)
    bench.worker.step()
    assert [bench.queue.state(id) for id in (good, broken, dropped)] == ["done", "failed", "cancelled"]
    assert gate.asked == [2] and bench.queue.record(good).scoring == "done"


def test_scores_are_handed_in_through_an_outage_of_the_queue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, score = [], bench.consumer.score

    def away_at_first(*arguments: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise RedisConnectionError
        return score(*arguments)

    monkeypatch.setattr(bench.consumer, "score", away_at_first)
    id = bench.queue.add(prompt="p", seeds=(1,))
    bench.worker.step()
    assert len(tries) == 3 and bench.queue.record(id).scoring == "done"


def test_a_student_without_scorers_awaits_none(bench: Bench) -> None:
    bench.runtime.student = replace(bench.runtime.student, scorers={})
    id = bench.queue.add(prompt="p", seeds=(1,))
    bench.worker.step()
    assert bench.queue.state(id) == "done" and bench.queue.record(id).scoring == ""


def scoring_of(url: str, id: str) -> Any:
    return call("GET", f"{url}/jobs/{id}").json()["scoring"]


def test_an_answer_does_not_wait_and_its_scores_are_in_the_job_the_events_and_the_metrics(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", SCORE="after") as live:
        answer = post(live.url, prompt="heart fake:score=1.5", seed=3, n=2).json()
        assert answer["scoring"] == "pending" and [image["reward"] for image in answer["data"]] == [{}, {}]
        check_answer(answer, "heart fake:score=1.5", [3, 4])
        events = listen("GET", f"{live.url}/jobs/{answer['id']}/events")
        assert [event.name for event in events][-2:] == ["done", "scored"]
        assert events[-2].data["job"]["scoring"] == "pending" and events[-1].number == 2000
        wanted = [expected("heart fake:score=1.5", seed) for seed in (3, 4)]
        assert events[-1].data["scoring"] == "done"
        assert [image["reward"] for image in events[-1].data["data"]] == wanted
        job = call("GET", f"{live.url}/jobs/{answer['id']}").json()
        assert job["scoring"] == "done" and [image["reward"] for image in job["data"]] == wanted
        again = httpx.get(f"{live.url}/jobs/{answer['id']}/events", headers={"Last-Event-ID": "2000"}, trust_env=False)
        assert again.status_code == 204
        file = call("GET", f"{live.url}/jobs/{answer['id']}/images/0")
        assert float(file.headers["X-Reward-Score"]) == pytest.approx(wanted[0]["trained"], abs=1e-6)
        streamed = listen(
            "POST", f"{live.url}/v1/images/generations", json={"prompt": "fake:score=600", "stream": True}
        )
        assert streamed[-1].name == "image_generation.completed", "OpenAI's clients read to the end of the stream"

        def counted() -> Any:
            samples = read(call("GET", f"{live.url}/metrics").text)
            return value(samples, "late_scores_total", **NAMED, end="done") == 1 and samples

        samples = eventually(counted, "the scores are counted")
        trained = {**NAMED, "scorer": "trained"}
        assert value(samples, "reward_score_count", **trained) == 2
        total = value(samples, "reward_above_total", **trained) - value(samples, "reward_below_total", **trained)
        assert total == pytest.approx(sum(score["trained"] for score in wanted))
        live.kill("worker")  # it would score for ten minutes


@pytest.mark.parametrize("under_load", [False, True])
def test_a_worker_that_is_killed_while_it_scores_loses_the_scores_and_no_job(tmp_path: Path, under_load: bool) -> None:
    with running_service(tmp_path / "data", SCORE="after") as live:
        prompts = [f"heart {k} fake:score=600" for k in range(20 if under_load else 1)]
        answers = [post(live.url, prompt=prompt, seed=7).json() for prompt in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            check_answer(answer, prompt, [7])
        assert {scoring_of(live.url, answer["id"]) for answer in answers} == {"pending"}
        os.kill(live.pids()["worker"], signal.SIGKILL)
        for answer in answers:
            eventually(lambda id=answer["id"]: scoring_of(live.url, id) == "lost", "the scores are lost")  # type: ignore[misc]
            job = call("GET", f"{live.url}/jobs/{answer['id']}").json()
            assert job["status"] == "done" and [image["reward"] for image in job["data"]] == [{}]

        def counted() -> bool:
            samples = read(call("GET", f"{live.url}/metrics").text)
            return value(samples, "late_scores_total", **NAMED, end="lost") == len(answers)

        eventually(counted, "each is counted once")
        again = post(live.url, prompt="after it", seed=1).json()
        eventually(lambda: scoring_of(live.url, again["id"]) == "done", "the next worker scores")
        assert int(live.redis.hget("fewstep:{fake}:n", "redelivered") or 0) == 0, "no job was drawn again"


def test_under_load_a_killed_worker_costs_no_picture_and_each_score_comes_once_or_is_lost(tmp_path: Path) -> None:
    bodies = [{"prompt": f"heart {k} fake:score=0.2", "seed": 7 * k, "n": 1 + k % 2} for k in range(24)]
    with running_service(tmp_path / "data", SCORE="after", LEASE_S="2") as live:
        with load(live.url, bodies) as asked:
            eventually(lambda: answered(asked, 8) and _some_are_scored(live.url, asked), "some have their scores")
            live.kill("worker")
        answers = [one.result() for one in asked]
        for body, answer in zip(bodies, answers, strict=True):
            check_answer(answer, str(body["prompt"]), [int(body["seed"]) + k for k in range(int(body["n"]))])  # type: ignore[call-overload]
        jobs = settled(live, answers)
        ends = check_each_once(live, jobs, ("trained", "heldout"))
        assert ends["done"] > 0 and ends["lost"] > 0 and ends["skipped"] == 0, ends
        for job, body in zip(jobs, bodies, strict=True):
            if job["scoring"] == "done":
                wanted = [expected(str(body["prompt"]), image["seed"]) for image in job["data"]]
                assert [image["reward"] for image in job["data"]] == wanted


def _some_are_scored(url: str, asked: Sequence[Future[Any]]) -> bool:
    done = [one.result()["id"] for one in asked if one.done()]
    ends = {scoring_of(url, id) for id in done}
    return {"pending", "done"} <= ends
