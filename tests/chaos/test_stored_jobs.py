"""An upgrade with the service stopped: what release 0.1.0 has stored in its queue, its results and its keys.

stored_by_0_1_0.json was written by that release, whose worker was killed while it drew one of the jobs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import ROWS
from tests.chaos.fleet import Fleet
from tests.chaos.table import Row
from tests.service.support import call, eventually

STORED: dict[str, Any] = json.loads(Path(__file__).with_name("stored_by_0_1_0.json").read_text("utf-8"))
IDS: dict[str, str] = STORED["ids"]
DOWN_S = 30.0  # between the last sign of the old release and the first of this one: longer than its leases
MOMENTS = range(10**15, 10**16)  # what is a time in microseconds among a queue's numbers


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """This release, started on all of that."""
    fleet = Fleet(tmp_path_factory.mktemp("upgrade") / "f", apis=0, workers=0)
    try:
        _restore(fleet)
        fleet.apis, fleet.workers = [fleet.add("api")], [fleet.add("worker")]
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.close()


def test_21_jobs_that_an_earlier_release_has_stored_are_drawn_and_answered(fleet: Fleet) -> None:
    cancelled = _asked(fleet, "POST", f"/jobs/{IDS['cancelled']}/cancel")
    ended = {name: _ended(fleet, name) for name in IDS}
    assert {name: job["status"] for name, job in ended.items() if name != "cancelled"} == dict.fromkeys(
        ("done", "repeated", "running", "queued", "jpeg"), "done"
    )
    assert cancelled.status_code == 200 and ended["cancelled"]["status"] in ("cancelled", "done"), "drawn by then"
    seeds = {name: [image["seed"] for image in job["data"]] for name, job in ended.items() if name != "cancelled"}
    assert seeds == {"done": [7, 8], "repeated": [8], "running": [9], "queued": [10], "jpeg": [11, 12, 13]}
    assert ended["done"]["user"] == "u1" and ended["done"]["metadata"] == {"a": "b"}
    assert ended["queued"]["priority"] == 2 and fleet.job(IDS["running"])["attempts"] == "2"
    assert set(ended["done"]["data"][0]["reward"]) == {"trained", "heldout"}
    files = {name: [_file(fleet, image) for image in job["data"]] for name, job in ended.items()}
    assert {file[:3] for file in files["jpeg"]} == {b"\xff\xd8\xff"}
    assert {file[:4] for name in ("done", "repeated", "running", "queued") for file in files[name]} == {b"\x89PNG"}
    eventually(fleet.at_rest, "nothing is left over")
    answered = sum(job["status"] == "done" for job in ended.values())
    ROWS.append(Row(21, "jobs stored by release 0.1.0", len(IDS), answered, len(IDS) - answered, 1, 0, 0, ""))


def test_a_request_that_is_repeated_after_the_upgrade_finds_its_job(fleet: Fleet) -> None:
    fields = {"prompt": "a blue star", "seed": 8}
    again = _asked(fleet, "POST", "/generate", json=fields, headers={"Idempotency-Key": "again-1"})
    assert again.status_code == 200 and again.json()["id"] == IDS["repeated"]
    other = _asked(fleet, "POST", "/generate", json={**fields, "seed": 9}, headers={"Idempotency-Key": "again-1"})
    assert other.status_code == 422 and "Idempotency-Key" in other.json()["error"]["message"]


def _restore(fleet: Fleet) -> None:
    """Everything as it was ``DOWN_S`` after the old release stopped: all moments are moved to today."""
    seconds, micros = fleet.redis.time()  # type: ignore[misc]
    later_us = seconds * 1_000_000 + micros - round((STORED["time"] + DOWN_S) * 1_000_000)
    for key, entry in STORED["keys"].items():
        if entry["pttl"] == -1 or entry["pttl"] > DOWN_S * 1000:
            _put(fleet, key, entry, later_us)
    for name, data in STORED["files"].items():
        path = fleet.folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


def _put(fleet: Fleet, key: str, entry: dict[str, Any], later_us: int) -> None:
    server, value = fleet.redis, entry["value"]
    match entry["type"]:
        case "string":
            server.set(key, value)
        case "hash":
            moved = {name: _moved(one, later_us) if name.endswith("_us") else one for name, one in value.items()}
            server.hset(key, mapping=moved)
        case "zset":
            server.zadd(key, {member: float(_moved(score, later_us)) for member, score in value})
        case "list":
            server.rpush(key, *value)
        case "stream":
            for id, fields in value:
                server.xadd(key, fields, id=id)
    if entry["pttl"] > 0:
        server.pexpire(key, round(entry["pttl"] - DOWN_S * 1000))


def _moved(number: str | float, later_us: int) -> str | float:
    return type(number)(int(float(number)) + later_us) if int(float(number)) in MOMENTS else number


def _asked(fleet: Fleet, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> Any:
    allowed = {"Authorization": f"Bearer {STORED['token']}", **(headers or {})}
    return call(method, f"{fleet.apis[0].url}{path}", headers=allowed, **options)


def _ended(fleet: Fleet, name: str) -> dict[str, Any]:
    def job() -> dict[str, Any] | None:
        found = _asked(fleet, "GET", f"/jobs/{IDS[name]}").json()
        return found if found["status"] not in ("queued", "running") else None

    return eventually(job, f"{name} has ended")  # type: ignore[return-value]


def _file(fleet: Fleet, image: dict[str, Any]) -> bytes:
    answer = call("GET", image["url"])
    assert answer.status_code == 200 and hashlib.sha256(answer.content).hexdigest() == image["sha256"]
    return answer.content
