"""Rows 1 to 6, 14, 17, 19, 21 and 23: workers that die, freeze, fail, leave, cannot store or are of another release."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.queue.job import SCHEMA_VERSION
from tests.chaos.clients import Clients, repeated
from tests.chaos.conftest import CHAOS_JOBS, Ledger
from tests.chaos.fleet import LEASE_S, Fleet, stop_gently
from tests.service.support import PATIENCE_S, call, check_answer, eventually, open_post, post

SHORT_S = 0.5  # the lease of a fleet of its own


def test_1_a_worker_is_killed_in_mid_batch(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int, seed: int
) -> None:
    chosen, kills = random.Random(seed), max(2, jobs // 20)
    clients.send(jobs, "fake:sleep=0.2")
    for _ in range(kills):
        fleet.wait_until_busy()
        chosen.choice(fleet.workers).send(signal.SIGKILL)
        time.sleep(0.3)
        if clients.account.answered == jobs:
            break
    ledger.close(1, "worker killed in mid-batch", clients, f"{kills} kills")
    assert fleet.at_rest() and fleet.redis.zcard(f"{fleet.prefix}dead") == 0


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Fleet]:
    """Leases so short that a hundred kills take minutes."""
    fleet = Fleet(tmp_path / "hasty", apis=1, workers=1, LEASE_S=str(SHORT_S), MAX_ATTEMPTS="50")
    yield fleet
    fleet.close()


def test_1_a_worker_is_killed_in_a_call_that_takes_longer_than_two_leases(
    hasty: Fleet, jobs: int, seed: int
) -> None:  # fmt: skip
    """At a random moment, and nothing is asked for meanwhile: no other job renews anything by the way."""
    chosen, kills = random.Random(seed), max(2, jobs if jobs >= CHAOS_JOBS else jobs // 6)
    with Clients([member.url for member in hasty.apis], seed) as clients:
        for _ in range(kills):
            clients.send(1, f"fake:sleep={3 * SHORT_S}")
            hasty.wait_until_busy()
            time.sleep(chosen.uniform(0, 3 * SHORT_S))
            hasty.workers[0].send(signal.SIGKILL)
            clients.settle()
            assert clients.account.lost == 0
        Ledger(hasty).close(1, "worker killed in a call of three leases", clients, f"{kills} kills")
    assert hasty.at_rest() and hasty.redis.zcard(f"{hasty.prefix}dead") == 0


def test_2_a_worker_is_frozen_longer_than_its_lease(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    before, zombie = fleet.counter("fenced"), fleet.workers[0]
    clients.send(jobs, "fake:sleep=0.3")
    eventually(lambda: _all_draw(fleet), "the worker that will be frozen draws")
    zombie.send(signal.SIGSTOP)
    try:
        clients.settle()  # all answered, though it still thinks that it holds some
    finally:
        zombie.send(signal.SIGCONT)
    fenced = eventually(lambda: fleet.counter("fenced") - before, "the zombie is turned away")
    ledger.close(
        2, "worker frozen for longer than its lease", clients, f"results of the zombie that were fenced: {fenced}"
    )


def _all_draw(fleet: Fleet) -> bool:
    names = {fleet.job(str(id)).get("worker") for id in fleet.redis.zrange(f"{fleet.prefix}l", 0, -1)}
    return len(names) >= len(fleet.workers)


def test_3_a_prompt_kills_every_worker(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    poison = call("POST", f"{fleet.apis[0].url}/generate", headers={"Prefer": "respond-async"},
                  json={"prompt": "fake:die", "seed": 1}).json()["id"]  # fmt: skip
    clients.send(jobs)
    ended = eventually(lambda: (job := fleet.job(poison))["state"] == "failed" and job, "given up", patience_s=120)
    attempts = int(ended["attempts"])
    report = call("GET", f"{fleet.apis[1].url}/jobs/{poison}").json()["error"]["code"]
    listed = call("GET", f"{fleet.apis[0].url}/admin/dlq").json()["data"]
    assert [letter["id"] for letter in listed] == [poison] and report == "worker_lost"
    assert call("POST", f"{fleet.apis[0].url}/admin/dlq/{poison}/drop").status_code == 200
    ledger.close(3, "a prompt that kills workers", clients, f"given up after {attempts} workers, mates answered")


def test_4_one_of_a_batch_fails(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    clients.send(jobs // 2, "fake:sleep=0.1")
    clients.send(1, "fake:raise")
    clients.send(1, "fake:nan")
    clients.send(jobs // 2, "fake:sleep=0.1")
    account = clients.settle()
    ledger.close(4, "an exception, and values that are not finite, in a batch", clients)
    assert account.refused == {"generation_failed": 2} and account.answered == account.sent - 2


def test_5_a_call_has_no_memory(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    clients.send(2, "fake:sleep=0.5")
    clients.send(jobs, "fake:oom")
    clients.settle()
    ledger.close(5, "no memory for a call of more than two images", clients, f"{_splits(fleet)} calls halved")
    assert clients.account.answered == clients.account.sent and _splits(fleet) > 0


def _splits(fleet: Fleet) -> int:
    lines = [line for api in fleet.apis for line in call("GET", f"{api.url}/metrics").text.splitlines()]
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("fewstep_oom_splits_total{")))


def test_6_a_worker_is_told_to_stop_under_load(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    redelivered = fleet.counter("redelivered")  # a lease may run out on a busy machine
    clients.send(jobs, "fake:sleep=0.2")
    fleet.wait_until_busy()
    leaving = fleet.workers[1]
    code = stop_gently(leaving)
    leaving.wanted = True
    ledger.close(6, "SIGTERM to a worker under load", clients, f"exit code {code}, no attempt counted")
    assert code == 0 and repeated(fleet, clients.account) == fleet.counter("redelivered") - redelivered


def test_14_clients_go_away(fleet: Fleet, clients: Clients, ledger: Ledger) -> None:
    before = set(fleet.redis.scan_iter(f"{fleet.prefix}j:*"))

    def new() -> list[dict[str, str]]:
        return [fleet.redis.hgetall(key) for key in set(fleet.redis.scan_iter(f"{fleet.prefix}j:*")) - before]  # type: ignore[misc]

    with open_post(fleet.apis[0].url, prompt="fake:step=1 leaves", seed=1):
        eventually(lambda: [job for job in new() if job.get("state") == "running"], "it is drawn")
    eventually(lambda: [job["state"] for job in new()] == ["cancelled"], "it is dropped")
    for worker in fleet.workers:
        worker.send(signal.SIGSTOP)
    try:
        with open_post(fleet.apis[0].url, prompt="leaves early", seed=1):
            eventually(lambda: len(new()) == 2, "it waits")
        ended = eventually(lambda: [job for job in new() if job["attempts"] == "0" and job["state"] == "cancelled"])
    finally:
        for worker in fleet.workers:
            worker.send(signal.SIGCONT)
    clients.send(4)
    ledger.close(14, "clients that go away", clients, f"one dropped while it ran, {len(ended)} never executed")


def test_17_a_deadline_is_shorter_than_the_queue(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    for worker in fleet.workers:
        worker.send(signal.SIGSTOP)
    try:
        late = post(fleet.apis[0].url, prompt="late", seed=1, timeout_s=0.3)
    finally:
        for worker in fleet.workers:
            worker.send(signal.SIGCONT)
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    states = [fleet.redis.hmget(key, "state", "attempts") for key in fleet.redis.scan_iter(f"{fleet.prefix}j:*")]
    assert ["expired", "0"] in states
    clients.send(jobs)
    ledger.close(17, "a deadline shorter than the queue", clients, "504, and never executed")


def test_21_two_releases_share_a_queue(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    """The newer one writes payloads that the older one cannot read, and each leaves the other's alone."""
    api, worker = fleet.add("api", "next release"), fleet.add("worker", "next release")
    try:
        eventually(lambda: _status(api.url) == 200, "the next release answers", patience_s=120)
        with Clients([api.url], 2) as others:
            others.send(jobs, "fake:sleep=0.1")
            clients.send(jobs, "fake:sleep=0.1")
            ledger.close(21, "two releases with different payloads (the older)", clients)
            ledger.close(21, "two releases with different payloads (the newer)", others)
            lanes = {fleet.job(id)["lane"][0] for id in others.account.ids.values()}
            assert lanes == {str(SCHEMA_VERSION + 1)}
            assert {fleet.job(id)["lane"][0] for id in clients.account.ids.values()} == {str(SCHEMA_VERSION)}
    finally:
        fleet.remove(worker)
        fleet.remove(api)
        time.sleep(2 * LEASE_S)


def test_21_a_release_that_says_more_shares_jobs_with_this_one(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int
) -> None:
    """In the middle of a rolling upgrade each draws what the other was asked for, and answers for what it drew."""
    api, worker = fleet.add("api", "a later release"), fleet.add("worker", "a later release")
    try:
        eventually(lambda: _status(api.url) == 200, "the later release answers", patience_s=120)
        with Clients([api.url], 5) as others:
            others.send(jobs, "fake:sleep=0.1")
            clients.send(jobs, "fake:sleep=0.1")
            ledger.close(21, "a later release beside this one (this one's clients)", clients)
            ledger.close(21, "a later release beside this one (the later one's clients)", others)
            drawn = {"mood" in fleet.job(id)["result"] for id in clients.account.ids.values()}
            asked = {"mood" in fleet.job(id)["payload"] for id in others.account.ids.values()}
        assert asked == {True} and drawn == {True, False}, "both have drawn for this one"
    finally:
        fleet.remove(worker)
        fleet.remove(api)
        time.sleep(2 * LEASE_S)


def _status(url: str) -> int:
    try:
        return call("GET", f"{url}/healthz").status_code
    except httpx.HTTPError:
        return 0


def test_23_clocks_are_an_hour_wrong(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    apis = [fleet.add("api", how) for how in ("an hour ahead", "an hour behind")]
    worker = fleet.add("worker", "an hour ahead")
    try:
        for api in apis:
            eventually(lambda url=api.url: _status(url) == 200, "it answers", patience_s=120)  # type: ignore[misc]
        with Clients([api.url for api in apis], 3) as others:
            others.send(jobs, "fake:sleep=0.1")
            ledger.close(23, "clocks of API and worker an hour wrong", others, "nothing expired early")
            image = next(iter(others.account.ids.values()))
        assert call("GET", f"{apis[0].url}/jobs/{image}/images/0").status_code == 200
    finally:
        for member in (worker, *apis):
            fleet.remove(member)
        time.sleep(2 * LEASE_S)


def test_19_the_result_store_is_away(fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int) -> None:
    aside = Path(f"{fleet.results}.aside")
    check_answer(post(fleet.apis[0].url, prompt="before", seed=1).json(), "before", [1])
    fleet.results.rename(aside)
    fleet.results.write_text("no directory")
    try:
        failed = httpx.post(f"{fleet.apis[0].url}/generate", json={"prompt": "p"}, timeout=PATIENCE_S, trust_env=False)
    finally:
        fleet.results.unlink()
        aside.rename(fleet.results)
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "storage_failed"
    clients.send(jobs)
    ledger.close(19, "the result store is away", clients, "500 storage_failed, never done without bytes")
