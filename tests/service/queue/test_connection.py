"""Connections to the queue's server: more callers than connections, and replicas that must hold a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StartupError
from service.http.tasks import end
from service.listener import listen
from service.queue import connection
from service.queue.connection import connect, connect_async
from service.queue.job import QueueOptions
from service.supervise.redis_server import EmbeddedServer
from tests.service.support import Api, Queue, call, eventually

CROWD = 600


def test_many_callers_at_once_take_turns(queue: Queue, runner: asyncio.Runner) -> None:
    """More than the server would ever be connected to: nobody is refused, and nothing is enqueued twice."""

    async def enqueue_all() -> list[str]:
        jobs = [queue.job() for _ in range(CROWD)]
        verdicts = await asyncio.gather(*(queue.producer.enqueue(job, QueueOptions(60)) for job in jobs))
        return [verdict.word for verdict in verdicts]

    assert runner.run(enqueue_all()) == ["ok"] * CROWD
    assert queue.client.zcard(f"{queue.prefix}pending") == CROWD
    assert len(queue.async_client.connection_pool._available_connections) <= connection.MOST_CONNECTIONS


def test_a_connection_that_never_comes_free_is_not_waited_for_without_end(
    redis_url: str, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 1)
    monkeypatch.setattr(connection, "CONNECTION_WAIT_S", 0.05)

    async def ask_while_it_is_taken() -> None:
        client = connect_async(redis_url, block_s=60)
        holding = asyncio.create_task(client.blpop(["nothing ever comes"], timeout=60))
        while not client.connection_pool._in_use_connections:
            await asyncio.sleep(0.01)
        with pytest.raises(RedisConnectionError):
            await client.ping()
        await end([holding])
        assert await client.ping(), "and then it is free again"
        await client.aclose()

    runner.run(ask_while_it_is_taken())


def test_a_call_is_bounded_whatever_the_server_does() -> None:
    """A server that is restarted is back within the 4 s or so of the repetitions; one that hangs holds a call for 5 s
    more than it was asked to wait; and no call, repetitions included, takes longer than 8."""
    for client in (connect("redis://q", block_s=2), connect_async("redis://q", block_s=2)):
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (7.0, 2.0)
        assert options["decode_responses"] is True
        retry = options["retry"]
        pauses = [retry._backoff.compute(k) for k in range(1, retry._retries + 1)]
        assert len(pauses) == 12 and 4.0 < sum(pauses) < 5.0 and (min(pauses), max(pauses)) == (0.04, 0.5)
    assert connection.LONGEST_CALL_S == 8.0
    assert connect("redis://q").connection_pool.connection_kwargs["socket_timeout"] == 5.0
    pool = connect_async("redis://q").connection_pool
    assert (pool.max_connections, pool.timeout) == (32, 4.0)
    assert connect("redis://q", retries=0).connection_pool.connection_kwargs["retry"]._retries == 0
    assert connect_async("redis://q", retries=1).connection_pool.connection_kwargs["retry"]._retries == 1


def test_a_call_that_takes_too_long_is_given_up_as_a_time_out_of_the_server(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LONGEST_CALL_S", 0.05)
    assert runner.run(connection.bounded(asyncio.sleep(0, "answer"))) == "answer"
    with pytest.raises(RedisTimeoutError, match="no answer within 0.05 s"):
        runner.run(connection.bounded(asyncio.sleep(30)))


@pytest.mark.parametrize(
    ("version", "refused"), [("7.0.0", False), ("7.2.4", False), ("8.0.1", False), ("10.1", False), ("6.9.9", True)]
)
def test_a_server_that_is_too_old_for_the_scripts_is_refused(
    version: str, refused: bool, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis.Redis, "info", lambda *_: {"redis_version": version})
    with pytest.raises(StartupError, match=f"has version {version}: accepted is 7.0") if refused else nullcontext():
        connection.check_server(redis_url)


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "connect", lambda url: connect(url, retries=0))
    with pytest.raises(StartupError, match=r"^The server of FEWSTEP_REDIS_URL does not answer \(.*\)\.$"):
        connection.check_server(f"unix://{tmp_path}/nowhere.sock")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """A server and its replica."""
    primary, replica = EmbeddedServer(tmp_path / "primary"), EmbeddedServer(tmp_path / "replica")
    primary.start()
    replica.start()
    with listen("127.0.0.1", 0) as probe:
        port = int(probe.getsockname()[1])
    connect(primary.url).config_set("port", port)
    connect(replica.url).execute_command("REPLICAOF", "127.0.0.1", port)
    linked = lambda: connect(replica.url).info("replication").get("master_link_status") == "up"  # noqa: E731
    eventually(linked, "the replica follows")
    yield primary, replica
    replica.stop()
    primary.stop()


def test_a_job_is_accepted_when_the_replica_holds_it(
    pair: tuple[EmbeddedServer, EmbeddedServer], tmp_path: Path
) -> None:
    primary, replica = pair
    api = Api(primary.url, tmp_path / "data", REPLICAS="1")
    try:
        eventually(lambda: call("GET", f"{api.url}/healthz").status_code == 200, "it answers")
        accepted = _later(api, "held twice")
        assert accepted.status_code == 202
        assert connect(replica.url).exists(f"{api.prefix}j:{accepted.json()['id']}")
        connect(replica.url).execute_command("REPLICAOF", "NO", "ONE")
        eventually(lambda: connect(primary.url).info("replication")["connected_slaves"] == 0, "it follows no more")
        refused = _later(api, "held once")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        assert sorted(api.states()) == ["cancelled", "queued"], "what was refused is not drawn"
    finally:
        api.close()


def _later(api: Api, prompt: str) -> httpx.Response:
    return call("POST", f"{api.url}/generate", headers={"Prefer": "respond-async"}, json={"prompt": prompt})


def test_a_listing_reads_no_more_than_it_shows(make_queue: Callable[..., Queue], runner: asyncio.Runner) -> None:
    queue = make_queue()
    ids = [queue.add(key="ann") for _ in range(25)]
    for id in ids[15:]:
        queue.client.delete(f"{queue.prefix}j:{id}")
    queue.client.config_resetstat()
    found = runner.run(queue.producer.owned("ann", 10))
    assert [record.id for record in found] == ids[:15][::-1][:10]
    stats = queue.client.info("commandstats")
    assert stats["cmdstat_zrevrangebyscore"]["calls"] == 2 and stats["cmdstat_hmget"]["calls"] == 20
    assert runner.run(queue.producer.owned("nobody", 10)) == []
