"""Rows 15, 16, 18 and 20: slow clients, repeated requests, too much at once, and an HTTP process that is killed."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.chaos.clients import Clients, repeated
from tests.chaos.conftest import Ledger
from tests.chaos.fleet import Fleet, Member
from tests.service.support import PATIENCE_S, call, eventually, open_post, post

SLOW_CLIENTS = 20


@contextmanager
def slow_clients(url: str) -> Iterator[None]:
    """Half of them send a request a byte at a time, half read their answer so."""
    host, _, port = url.removeprefix("http://").partition(":")
    end = threading.Event()

    def trickle(connection: socket.socket) -> None:
        for byte in b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
            if end.wait(0.2):
                return
            connection.sendall(bytes([byte]))

    def sip(connection: socket.socket) -> None:
        while not end.wait(0.2):
            connection.recv(1)

    with ExitStack() as stack, ThreadPoolExecutor(SLOW_CLIENTS) as pool:
        for k in range(SLOW_CLIENTS):
            if k % 2:
                connection = stack.enter_context(socket.create_connection((host, int(port))))
            else:
                connection = stack.enter_context(open_post(url, prompt=f"sipped {k}", seed=k, n=4))
            connection.settimeout(30)
            pool.submit(trickle if k % 2 else sip, connection)
        try:
            yield
        finally:
            end.set()


def test_15_slow_clients_hold_up_nobody(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    with slow_clients(fleet.apis[0].url):
        clients.send(jobs)
        clients.settle()
    ledger.close(15, f"{SLOW_CLIENTS} clients that send or read 5 bytes a second", clients)
    assert clients.account.answered == clients.account.sent


def test_16_a_request_is_sent_many_times_at_once(fleet: Fleet, clients: Clients, ledger: Ledger) -> None:
    before = fleet.counter("finished")
    body, headers = {"prompt": "fake:sleep=0.3 once", "seed": 5}, {"Idempotency-Key": "the-same"}

    def ask(k: int) -> dict[str, object]:
        url = fleet.apis[k % 2].url
        answer = call("POST", f"{url}/generate", json=body, headers=headers)
        return dict(answer.json())

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert fleet.counter("finished") - before == 1, [answer.get("id", answer) for answer in answers]
    assert [answer for answer in answers if answer != answers[0]] == []
    other = call("POST", f"{fleet.apis[0].url}/generate", json={**body, "seed": 6}, headers=headers)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_mismatch"
    clients.send(4)
    ledger.close(16, "the same request 20 times at once", clients, "one execution, 20 equal answers; another body: 422")


@pytest.mark.slow
def test_18_five_times_as_much_as_can_be_done(fleet: Fleet, ledger: Ledger, jobs: int, seed: int) -> None:
    small = fleet.add("api", MAX_PENDING="10")
    try:
        eventually(lambda: _answers(small.url), "it answers", patience_s=120)
        with Clients([small.url], seed, threads=5 * 16, patient=False) as crowd:
            crowd.send(2 * jobs, "fake:sleep=0.3")
            account = crowd.settle()
            crowded = statistics.median(account.refusal_s)
            with _full(fleet, small.url):
                spent = _processor_s(small)
                alone = statistics.median(_refused(small.url, jobs))
                spent = (_processor_s(small) - spent) / jobs
            seen = (
                f"a refusal costs the service {spent * 1000:.1f} ms of its core; median for one client "
                f"{alone * 1000:.0f} ms, for 80 clients on the same core {crowded * 1000:.0f} ms"
            )
            ledger.close(18, "five times as many clients as places", crowd, seen)
            assert set(account.refused) == {"queue_full"} and account.answered > 0
        eventually(lambda: post(small.url, prompt="p").status_code == 200, "it takes work again")
    finally:
        fleet.remove(small)


def _processor_s(member: Member) -> float:
    """The processor's time that a process has used: what it takes itself, however busy the machine is."""
    fields = Path(f"/proc/{member.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _full(fleet: Fleet, url: str) -> Iterator[None]:
    """A queue that stays full: nobody draws."""
    for worker in fleet.workers:
        worker.send(signal.SIGSTOP)
    waiting: list[str] = []
    try:
        while (answer := _later(url)).status_code == 202:
            waiting.append(answer.json()["id"])
        yield
    finally:
        for worker in fleet.workers:
            worker.send(signal.SIGCONT)
        for id in waiting:
            call("POST", f"{url}/jobs/{id}/cancel")


def _later(url: str) -> httpx.Response:
    return call("POST", f"{url}/generate", headers={"Prefer": "respond-async"}, json={"prompt": "fills"})


def _refused(url: str, count: int) -> list[float]:
    """Seconds until each of so many requests was refused, one after the other on one connection."""
    taken = []
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        for _ in range(count):
            began = time.perf_counter()
            assert client.post(f"{url}/generate", json={"prompt": "refused"}).status_code == 503
            taken.append(time.perf_counter() - began)
    return taken


def _answers(url: str) -> bool:
    try:
        return call("GET", f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_20_an_http_process_is_killed_while_clients_wait(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int
) -> None:
    redelivered = fleet.counter("redelivered")  # a lease may run out on a busy machine
    clients.send(jobs, "fake:sleep=0.5")
    fleet.wait_until_busy()
    fleet.apis[0].send(signal.SIGKILL)
    clients.settle()
    ledger.close(20, "HTTP process killed with waiting clients", clients, "asked again elsewhere, not executed again")
    assert repeated(fleet, clients.account) == fleet.counter("redelivered") - redelivered
