"""Rows 7 to 13: the queue's server is killed, emptied, full, slow, unreachable or replaced by a stale replica."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable

import pytest

from service.listener import listen
from service.queue.connection import connect
from service.queue.scripts import source
from tests.chaos.clients import Clients, repeated
from tests.chaos.conftest import Ledger
from tests.chaos.fleet import Fleet
from tests.service.support import call, check_answer, eventually, post


def later(fleet: Fleet, prompt: str) -> str:
    body = {"prompt": prompt, "seed": 1}
    answer = call("POST", f"{fleet.apis[0].url}/generate", headers={"Prefer": "respond-async"}, json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("away_s", [1.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_7_the_server_is_killed_and_comes_back(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int, away_s: float
) -> None:
    clients.send(jobs, "fake:sleep=0.2")
    fleet.wait_until_busy()
    waiting = [later(fleet, f"later {k}") for k in range(5)]
    fleet.kill_server()
    ready = call("GET", f"{fleet.apis[0].url}/readyz").status_code
    alive = call("GET", f"{fleet.apis[0].url}/healthz").status_code
    time.sleep(away_s)
    fleet.restart_server()
    clients.settle()
    for id in waiting:
        eventually(lambda id=id: fleet.job(id)["state"] == "done", "what was accepted is drawn")  # type: ignore[misc]
    ledger.close(
        7, f"server killed, back after {away_s:g} s", clients, f"5 more asked for later: 5 done; readyz {ready}"
    )
    assert (ready, alive) == (503, 200)


def test_8_the_server_comes_back_empty(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    old = later(fleet, "forgotten")
    eventually(lambda: fleet.job(old)["state"] == "done", "it is drawn")
    clients.send(jobs, "fake:sleep=0.2")
    fleet.wait_until_busy()
    fleet.kill_server()
    fleet.restart_server(empty=True)
    clients.settle()
    assert call("GET", f"{fleet.apis[0].url}/jobs/{old}").status_code == 404
    ledger.close(8, "server comes back without its data", clients, "who waited was queued again; old ids are 404")


def test_9_the_server_has_no_memory(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    held = later(fleet, "fake:sleep=1 held")
    fleet.wait_until_busy()
    fleet.redis.config_set("maxmemory", "1b")
    try:
        refused = post(fleet.apis[0].url, prompt="refused")
        eventually(lambda: fleet.job(held)["state"] == "done", "what runs can be finished")
    finally:
        fleet.redis.config_set("maxmemory", "512mb")
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    clients.send(jobs)
    ledger.close(9, "server at maxmemory", clients, "new work 503, what ran was finished")


def test_10_the_servers_disk_is_full(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    kept = later(fleet, "kept")
    eventually(lambda: fleet.job(kept)["state"] == "done", "it is drawn")
    fleet.limit_files(1)
    try:
        refused = eventually(
            lambda: (r := post(fleet.apis[0].url, prompt="p", timeout_s=2)).status_code == 503 and r, "it refuses"
        )
        found = call("GET", f"{fleet.apis[0].url}/jobs/{kept}").status_code
    finally:
        fleet.limit_files(2**40)
    assert "Retry-After" in refused.headers and found == 200
    eventually(lambda: post(fleet.apis[0].url, prompt="p").status_code == 200, "it takes work again", patience_s=60)
    clients.send(jobs)
    ledger.close(10, "the disk of the server is full", clients, "new work 503, reading goes on")


@pytest.mark.parametrize("name", ["enqueue", "claim", "finish", "beat"])
def test_11_answers_of_the_server_are_lost(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int, name: str
) -> None:
    proxy = fleet.api_side if name == "enqueue" else fleet.worker_side
    before, finished, redelivered = proxy.lost, fleet.counter("finished"), fleet.counter("redelivered")
    proxy.lose_answers(_sha(name).encode(), 5)
    clients.send(jobs, "fake:sleep=0.1")
    clients.settle()
    eventually(lambda: proxy.lost - before >= (1 if name == "beat" else 3), "answers are lost")
    lost = proxy.lost - before
    proxy.lose_answers(_sha(name).encode(), 0)
    ledger.close(11, f"lost answers to {name}", clients, f"{lost} lost, each job one end")
    assert fleet.counter("finished") - finished == jobs
    assert repeated(fleet, clients.account) == fleet.counter("redelivered") - redelivered


def _sha(name: str) -> str:
    """What a registered script is called by."""
    return hashlib.sha1(source(name).encode(), usedforsecurity=False).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["api_side", "worker_side"])
def test_12_the_network_is_cut(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int, side: str) -> None:
    proxy = getattr(fleet, side)
    clients.send(jobs, "fake:sleep=0.2")
    fleet.wait_until_busy()
    proxy.silent = True
    began = time.monotonic()
    status = call("GET", f"{fleet.apis[0].url}/jobs/{'0' * 32}").status_code
    took_s = time.monotonic() - began
    proxy.silent = False
    clients.settle()
    who = "HTTP processes" if side == "api_side" else "workers"
    ledger.close(
        12, f"network between {who} and server silent", clients, f"a request then: {status} after {took_s:.1f} s"
    )
    assert status == (503 if side == "api_side" else 404)


@pytest.mark.slow
def test_12_the_network_is_slow(fleet: Fleet, clients: Clients, ledger: Ledger) -> None:
    for proxy in (fleet.api_side, fleet.worker_side):
        proxy.delay_s = 0.25
    try:
        clients.send(8)
        clients.settle()
    finally:
        for proxy in (fleet.api_side, fleet.worker_side):
            proxy.delay_s = 0.0
    ledger.close(12, "every call to the server takes 0.5 s", clients)


@pytest.mark.slow
def test_13_a_stale_replica_takes_over(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    """Replication stops, work is accepted, and then the primary is gone: who waits does not notice."""
    primary, replica = fleet.server, fleet.new_server("replica")
    port = _open_port(fleet)
    connect(replica.url).execute_command("REPLICAOF", "127.0.0.1", port)
    linked: Callable[[], bool] = lambda: connect(replica.url).info("replication").get("master_link_status") == "up"  # noqa: E731
    eventually(linked, "the replica follows")
    kept = later(fleet, "kept")
    eventually(lambda: connect(replica.url).exists(f"{fleet.prefix}j:{kept}"), "it has arrived")
    connect(replica.url).execute_command("REPLICAOF", "NO", "ONE")
    clients.send(jobs, "fake:sleep=0.2")
    for worker in fleet.workers:
        worker.send(signal.SIGSTOP)
    gone = [later(fleet, f"gone {k}") for k in range(5)]
    fleet.kill_server()
    fleet.move_to(replica)
    for worker in fleet.workers:
        worker.send(signal.SIGCONT)
    clients.settle()
    missing = sum(not fleet.job(id) for id in gone)
    eventually(lambda: fleet.held() == 0, "no lease is stuck")
    ledger.close(13, "failover to a stale replica", clients, f"of 5 asked for later in the window, {missing} are lost")
    check_answer(post(fleet.apis[0].url, prompt="after", seed=1).json(), "after", [1])
    primary.stop()


def _open_port(fleet: Fleet) -> int:
    """Let the server listen on a free port, too."""
    with listen("127.0.0.1", 0) as probe:
        port = int(probe.getsockname()[1])
    fleet.redis.config_set("port", port)
    return port
