"""What was given up: listed, tried again alone as a job of its own, dropped; and where its tokens come from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep.cli import app
from service.queue.connection import connect
from service.queue.dead_letters import DeadLetterQueue
from service.queue.job import Job, QueueOptions, Verdict
from service.supervise.redis_server import EmbeddedServer
from tests.service.support import Api, Queue, call, eventually, running_service

RESULT: dict[str, Any] = {"images": [], "runtime": "fake"}


def kill(queue: Queue, id: str) -> None:
    """Every worker that draws it dies."""
    for attempt in range(int(queue.limits["max_attempts"])):
        assert [claimed.id for claimed in queue.consumer(f"w{attempt}").claim({queue.lane: 8})] == [id]
        queue.let_leases_end()
        queue.reap()
    assert queue.state(id) == "failed"


def test_a_dead_letter_is_tried_again_alone_as_another_job_and_only_once(queue: Queue) -> None:
    id = queue.add(prompt="poison", key="ann", seeds=(1, 2))
    kill(queue, id)
    letters = DeadLetterQueue(queue.producer)
    [letter] = queue.runner.run(letters.newest(10))
    assert (letter.record.id, letter.attempts, letter.worker, letter.record.key) == (id, 3, "w2", "ann")
    mate = queue.add()
    first = queue.runner.run(letters.retry(letter, 60.0))
    again = queue.runner.run(letters.retry(letter, 60.0))
    assert (first.word, again.word) == ("ok", "known") and first.id == again.id != id
    assert queue.runner.run(letters.newest(10)) == []
    assert queue.state(id) == "failed", "what has ended stays so"
    worker = queue.consumer("w")
    batches = [worker.claim({queue.lane: 8}), worker.claim({queue.lane: 8})]
    assert sorted([[claimed.id for claimed in batch] for batch in batches]) == sorted([[mate], [first.id]])
    record = queue.record(first.id)
    assert (record.key, record.job.prompt, record.job.seeds) == ("ann", "poison", (1, 2))


def test_a_dropped_letter_is_kept_no_longer_than_another_job(queue: Queue) -> None:
    id = queue.add()
    kill(queue, id)
    letters = DeadLetterQueue(queue.producer)
    assert queue.client.pttl(f"{queue.prefix}j:{id}") > 6 * 86_400_000
    assert queue.runner.run(letters.drop(id)) and not queue.runner.run(letters.drop(id))
    assert queue.runner.run(letters.find(id)) is None
    assert 0 < queue.client.pttl(f"{queue.prefix}j:{id}") <= 60_000


def test_the_newest_letters_are_listed_and_no_more_than_are_wanted(queue: Queue) -> None:
    ids = []
    for k in range(3):
        ids.append(queue.add(seeds=(k,)))
        kill(queue, ids[-1])
    letters = DeadLetterQueue(queue.producer)
    for limit in (1, 2, 3, 9):
        found = queue.runner.run(letters.newest(limit))
        assert [letter.record.id for letter in found] == ids[::-1][:limit]
        assert [letter.died_s for letter in found] == sorted((letter.died_s for letter in found), reverse=True)
    queue.client.delete(f"{queue.prefix}j:{ids[2]}")
    assert [letter.record.id for letter in queue.runner.run(letters.newest(2))] == [ids[1]], "its record is gone"


@pytest.mark.parametrize(("word", "dropped"), [("known", True), ("attached", True), ("full", False), ("gone", False)])
def test_a_letter_is_dropped_once_its_job_is_queued_whoever_has_queued_it(
    word: str, dropped: bool, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = queue.add()
    kill(queue, id)
    letters, asked = DeadLetterQueue(queue.producer), list[QueueOptions]()

    async def enqueue(job: Job, options: QueueOptions) -> Verdict:
        asked.append(options)
        return Verdict(word, job.id, 0.0, 0)  # type: ignore[arg-type]

    monkeypatch.setattr(queue.producer, "enqueue", enqueue)
    [letter] = queue.runner.run(letters.newest(10))
    assert queue.runner.run(letters.retry(letter, 60.0)).word == word
    assert (queue.runner.run(letters.newest(10)) == []) is dropped
    assert asked == [QueueOptions(60.0, quota=0, solo=True)]


def test_a_server_that_lost_its_data_gives_no_token_a_second_time(queue: Queue) -> None:
    """Else the worker of the lost data could end the job of another: both would hold (id, 1)."""
    job = queue.job()
    queue.enqueue(job)
    [old] = queue.consumer("old").claim({queue.lane: 8})
    queue.client.delete(*queue.client.keys(f"{queue.prefix}*"))
    assert queue.enqueue(job) == "ok"
    [new] = queue.consumer("new").claim({queue.lane: 8})
    assert new.id == old.id and int(new.token) > int(old.token)
    assert queue.consumer("old").finish(job.id, old.token, "done", RESULT) == "fenced"
    assert queue.state(job.id) == "running"


def test_the_whole_queue_runs_on_a_node_of_a_cluster(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster refuses a script or a call whose keys lie in different slots."""
    usual = EmbeddedServer._arguments
    monkeypatch.setattr(EmbeddedServer, "_arguments", lambda self: [*usual(self), "--cluster-enabled", "yes"])
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    try:
        connect(server.url).execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        eventually(lambda: "cluster_state:ok" in str(connect(server.url).execute_command("CLUSTER", "INFO")))
        queue = Queue(server.url, runner)
        ids = [queue.add(seeds=(k,)) for k in range(3)]
        worker = queue.consumer("w")
        batch = worker.claim({queue.lane: 2})
        held = [(claimed.id, claimed.token) for claimed in batch]
        assert worker.beat({"runtime": "fake"}, held) == {}
        assert worker.show(ids[0], batch[0].token, {"0:0": "x"})
        assert worker.finish(ids[0], batch[0].token, "done", RESULT) == "done" and worker.release(held[1:]) == 1
        queue.cancel(ids[2])
        worker.wait([queue.lane, "other"], 0.1)
        queue.let_leases_end()
        assert queue.reap() == 0 and queue.runner.run(queue.producer.depth()).waiting == 1
        kill(queue, ids[1])
        letters = DeadLetterQueue(queue.producer)
        [letter] = runner.run(letters.newest(5))
        assert runner.run(letters.retry(letter, 60.0)).word == "ok"
        runner.run(queue.close())
    finally:
        server.stop()


def fewstep(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_an_operator_lists_retries_and_drops(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", MAX_ATTEMPTS="1") as service:
        ids = []
        for k in range(2):
            body = {"prompt": f"fake:die canary {k}", "seed": k}
            accepted = call("POST", f"{service.url}/generate", headers={"Prefer": "respond-async"}, json=body)
            ids.append(accepted.json()["id"])
            eventually(lambda: service.redis.zcard("fewstep:{fake}:dead") == len(ids), "it is given up")
        code, output = fewstep("dlq", "list", "--json", "--url", service.url)
        letters = json.loads(output)["data"]
        assert code == 0 and [letter["id"] for letter in letters] == ids[::-1]
        assert letters[0]["prompt"] is None and letters[0]["prompt_chars"] == len("fake:die canary 1")
        assert "canary" not in fewstep("dlq", "list", "--url", service.url)[1]
        code, output = fewstep("dlq", "retry", ids[0], "--json", "--url", service.url)
        other = json.loads(output)["retried_as"]
        eventually(lambda: call("GET", f"{service.url}/jobs/{other}").json()["status"] == "failed", "it dies again")
        assert fewstep("dlq", "drop", ids[1], "--url", service.url) == (0, f"{ids[1]} was dropped.\n")
        code, output = fewstep("dlq", "drop", ids[1], "--url", service.url)
        assert code == 5 and output == "fewstep: There is no such dead letter.\n"
        left = json.loads(fewstep("dlq", "list", "--json", "--url", service.url)[1])["data"]
        assert [letter["id"] for letter in left] == [other]


def test_a_letter_of_another_version_can_be_dropped_and_not_retried(make_api: Callable[..., Api]) -> None:
    api = make_api()
    body = {"prompt": "p"}
    id = call("POST", f"{api.url}/generate", headers={"Prefer": "respond-async"}, json=body).json()["id"]
    api.redis.hset(f"{api.prefix}j:{id}", "payload", "{}")
    api.redis.zadd(f"{api.prefix}dead", {id: 1e15})
    [letter] = call("GET", f"{api.url}/admin/dlq").json()["data"]
    assert letter["model"] is None and letter["prompt_chars"] is None
    assert call("POST", f"{api.url}/admin/dlq/{id}/retry").status_code == 409
    assert call("POST", f"{api.url}/admin/dlq/{id}/drop").json() == {"id": id, "dropped": True}
    assert call("POST", f"{api.url}/admin/dlq/{id}/retry").status_code == 404


def test_a_retry_keeps_the_webhook_and_the_idempotency_key(queue: Queue) -> None:
    job = queue.job()
    options = {"webhook": '{"url": "https://x"}', "idempotency": "digest", "body": "b"}
    assert queue.enqueue(job, **options) == "ok"
    kill(queue, job.id)
    letters = DeadLetterQueue(queue.producer)
    letter = queue.runner.run(letters.find(job.id))
    assert letter
    again = queue.runner.run(letters.retry(letter, 60.0))
    assert again.word == "ok" and again.id != job.id
    assert queue.field(again.id, "webhook") == options["webhook"]
    repeated = queue.ask(queue.job(), **options)
    assert (repeated.word, repeated.id) == ("attached", again.id), "the client's own retry finds it"
    queue.draw()
    assert str(again.id) in queue.client.zrange(f"{queue.prefix}wh", 0, -1)
