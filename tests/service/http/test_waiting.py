"""An HTTP process without workers: what becomes of requests that wait, and of those that cannot."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.exceptions import TimeoutError as RedisTimeout

from service.http.routes.probes import ASK_S, promptly
from service.http.tasks import end
from service.keys import KeyStore
from service.observe.background import Background
from service.queue.connection import connect_async
from service.queue.job import Job, QueueOptions, Record
from service.queue.replies import Replies
from service.queue.result import read_result
from tests.service.http.test_http import check_error
from tests.service.support import Api, Queue, Service, call, eventually, post

WAITING_FOR_EVER = {"REQUEST_TIMEOUT_S": "600"}
PAUSE_MS = 20_000  # ended by the test itself
RESULT = {"images": [], "runtime": "fake"}


def open_request(api: Api, *headers: str) -> socket.socket:
    """A request on a connection that the test can break."""
    body = json.dumps({"prompt": "p"})
    named = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    connection = socket.create_connection(api.address)
    connection.sendall("\r\n".join(("POST /generate HTTP/1.1", *named, "", body)).encode())
    return connection


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make_api: Callable[..., Api]) -> None:
    api = make_api(MAX_PENDING="2", **WAITING_FOR_EVER)
    with open_request(api), open_request(api):
        eventually(lambda: api.waiting() == 2)
        response = post(api.url, prompt="p")
        assert response.status_code == 503 and response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["Retry-After"]) >= 1
        assert api.waiting() == 2


def test_a_request_that_waits_too_long_gets_504_and_leaves_no_work_behind(make_api: Callable[..., Api]) -> None:
    api = make_api(REQUEST_TIMEOUT_S="0.3")
    response = post(api.url, prompt="p")
    assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    assert api.waiting() == 0 and api.states() == ["expired"]


def test_a_retry_whose_time_runs_out_leaves_the_first_request_alone_with_its_job(make_api: Callable[..., Api]) -> None:
    first = make_api(RETRY_GRACE_S="0.1", **WAITING_FOR_EVER)
    second = make_api(RETRY_GRACE_S="0.1", REQUEST_TIMEOUT_S="0.5")
    with open_request(first, "Idempotency-Key: k") as connection:
        eventually(lambda: first.waiting() == 1)
        answer = call("POST", f"{second.url}/generate", json={"prompt": "p"}, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert first.states() == ["queued"], "the first one still waits"
        connection.close()
        eventually(lambda: first.waiting() == 0, "nobody waits for it any more")


def test_a_client_that_goes_away_takes_its_job_with_it(make_api: Callable[..., Api]) -> None:
    api = make_api(**WAITING_FOR_EVER)
    gone, stays = open_request(api), open_request(api)
    with stays:
        eventually(lambda: api.waiting() == 2)
        gone.close()
        eventually(lambda: sorted(api.states()) == ["cancelled", "queued"])
        assert api.waiting() == 1
        metrics = call("GET", f"{api.url}/metrics").text
        assert 'fewstep_requests_total{code="499",method="POST",route="/generate"} 1.0' in metrics


def test_without_a_worker_it_lives_and_is_not_ready(make_api: Callable[..., Api]) -> None:
    api = make_api()
    assert call("GET", f"{api.url}/healthz").status_code == 200
    ready = call("GET", f"{api.url}/readyz")
    assert ready.status_code == 503 and ready.json()["error"]["message"] == "No worker is alive."
    assert "Retry-After" in ready.headers


def test_a_queue_is_not_waited_for_longer_than_a_moment() -> None:
    """The client of the queue would wait for seconds, and a load balancer would take the process for dead."""

    async def asked() -> None:
        await asyncio.wait_for(promptly(asyncio.sleep(60)), 20 * ASK_S)

    with pytest.raises(RedisTimeout, match="no answer within 0.5 s"):
        asyncio.run(asked())


def test_a_server_that_does_not_answer_is_one_that_is_away(make_api: Callable[..., Api]) -> None:
    api = make_api()
    api.redis.client_pause(PAUSE_MS)
    try:
        for path in ("/readyz", "/info"):
            answer = call("GET", f"{api.url}{path}")
            assert "The queue cannot be reached" in check_error(answer, 503, "unavailable")
        assert call("GET", f"{api.url}/metrics").status_code == 200
    finally:
        api.redis.client_unpause()
    assert call("GET", f"{api.url}/info").status_code == 200


def test_without_a_server_it_lives_and_refuses(tmp_path: Path) -> None:
    api = Api("unix:///nowhere/redis.sock", tmp_path / "data")
    try:
        assert call("GET", f"{api.url}/healthz").status_code == 200
        for path in ("/readyz", "/info"):
            assert "The queue cannot be reached" in check_error(call("GET", f"{api.url}{path}"), 503, "unavailable")
        response = post(api.url, prompt="p")
        assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"
        assert call("GET", f"{api.url}/metrics").status_code == 200
    finally:
        api.close()


def test_whoever_waits_when_it_stops_is_told_so(make_api: Callable[..., Api]) -> None:
    api = make_api(**WAITING_FOR_EVER)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, api.url, prompt="p")
        eventually(lambda: api.waiting() == 1)
        api.process.send_signal(signal.SIGTERM)
        response = waiting.result()
    [id] = api.ids()
    assert response.status_code == 503 and response.headers["Location"] == f"/jobs/{id}"
    assert response.json()["error"]["message"].startswith("The service is stopping, and the job will continue")
    api.process.wait(10)
    assert api.states() == ["queued"] and api.hash_of(id)["detached"] == "1"


def test_a_server_that_comes_back_without_its_data_is_given_the_waiting_jobs_again(
    make_api: Callable[..., Api],
) -> None:
    api = make_api(**WAITING_FOR_EVER)
    with open_request(api):
        eventually(lambda: api.waiting() == 1)
        [before] = api.redis.keys(f"{api.prefix}j:*")
        api.redis.flushall()
        eventually(lambda: api.waiting() == 1, "the job is back")
        assert api.redis.keys(f"{api.prefix}j:*") == [before], "under its own id"


class Waiter:
    """Somebody who waits for a job's result, beside a reader that may be out of order."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.observed: list[str] = []
        client = connect_async(queue.url, block_s=2)
        self.replies = Replies(
            client, queue.producer, queue.model, "api", lambda record: self.observed.append(record.id)
        )
        self.client = client

    async def enqueue(self, job: Job) -> str:
        return (await self.queue.producer.enqueue(job, QueueOptions(60.0))).id

    async def result(self, job: Job, *, reading: bool, then: Callable[[], None]) -> Record:
        reader = asyncio.create_task(Background().forever("replies", self.replies.read)) if reading else None

        try:
            with self.replies.news(job.id) as news:
                await self.enqueue(job)
                await asyncio.to_thread(then)
                return await asyncio.wait_for(self.replies.ended(job.id, news, lambda: self.enqueue(job)), 20)
        finally:
            if reader:
                await end([reader])
            await self.client.aclose()


def draw(queue: Queue, job: Job) -> None:
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    worker.finish(job.id, claimed.token, "done", RESULT)


def test_an_answer_that_is_there_before_anybody_waits_is_found(queue: Queue) -> None:
    job, waiter = queue.job(), Waiter(queue)
    record = queue.runner.run(waiter.result(job, reading=True, then=lambda: draw(queue, job)))
    assert (record.id, record.state, record.result) == (
        job.id,
        "done",
        read_result(json.dumps({**RESULT, "version": 1})),
    )


def test_an_answer_whose_notice_is_lost_is_found(queue: Queue) -> None:
    job, waiter = queue.job(), Waiter(queue)
    record = queue.runner.run(waiter.result(job, reading=False, then=lambda: draw(queue, job)))
    assert record.state == "done" and waiter.observed == []


def test_every_job_that_ends_is_observed_once_even_if_nobody_waits(queue: Queue) -> None:
    ignored, job, waiter = queue.job(), queue.job(), Waiter(queue)

    def draw_both() -> None:
        for claimed in queue.consumer("w").claim({queue.lane: 8}):
            queue.consumer("w").finish(claimed.id, claimed.token, "done", RESULT)

    queue.enqueue(ignored)
    queue.runner.run(waiter.result(job, reading=True, then=draw_both))
    assert sorted(waiter.observed) == sorted([ignored.id, job.id])


def test_a_client_that_goes_away_while_its_picture_is_drawn_gets_none(live: Service) -> None:
    """The mark reaches the worker; on a runtime without visible steps the job ends with its batch, cancelled."""
    body = json.dumps({"prompt": "fake:sleep=1.5 gone", "seed": 1}).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    connection.sendall(head.format(len(body)).encode() + body)

    def job() -> str:
        for key in live.redis.scan_iter("fewstep:{fake}:j:*"):
            if "gone" in str(live.redis.hget(key, "payload")) and live.redis.hget(key, "state") == "running":
                return str(key)
        return ""

    key = eventually(job, "the job runs")
    threading.Thread(target=connection.close).start()
    eventually(lambda: live.redis.hget(key, "state") == "cancelled", "the job is cancelled")
    id = key.rpartition(":")[2]
    assert not list((live.data_dir / "results").glob(f"*/{id}/*/*"))


def test_where_to_ask_is_below_the_address_that_clients_know(make_api: Callable[..., Api], tmp_path: Path) -> None:
    """Behind a proxy that strips a path, a path of this process leads nowhere."""
    _, text = KeyStore(tmp_path / "data").create("ann")
    api = make_api(PUBLIC_URL="https://images.example/fewstep")
    headers = {"Authorization": f"Bearer {text}", "Prefer": "respond-async"}
    accepted = call("POST", f"{api.url}/generate", headers=headers, json={"prompt": "p"})
    id = accepted.json()["id"]
    assert accepted.headers["Location"] == f"https://images.example/fewstep/jobs/{id}"
    described = call("GET", f"{api.url}/openapi.json", headers=headers).json()
    assert described["servers"] == [{"url": "https://images.example/fewstep"}]
