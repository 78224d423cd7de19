"""Row 22: whatever is sent, nothing is answered with 5xx, no memory stays behind, no log tells a prompt or a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hostile import corpus, flood
from service.keys import KeyStore
from tests.chaos.clients import Clients
from tests.chaos.conftest import Ledger
from tests.chaos.fleet import Fleet
from tests.service.support import PATIENCE_S, call, open_post, running_service

QUICK, WHOLE = 600, 10_000
GROWTH_LIMIT_KIB = 24 * 1024


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_22_hostile_requests(
    fleet: Fleet, clients: Clients, ledger: Ledger, jobs: int, seed: int, request: pytest.FixtureRequest
) -> None:
    count = WHOLE if request.config.getoption("--chaos") else QUICK
    api = fleet.apis[1]
    host, _, port = api.url.removeprefix("http://").partition(":")
    flood((host, int(port)), seed + 1, count // 10, 4)
    before = resident_kib(api.process.pid)
    clients.send(jobs)
    statuses = flood((host, int(port)), seed, count, 4)
    clients.settle()
    grown = resident_kib(api.process.pid) - before
    answers = ", ".join(f"{number} x {status or 'closed'}" for status, number in sorted(statuses.items()))
    ledger.close(22, f"{count:,} hostile requests", clients, f"{answers}; memory {grown / 1024:+.1f} MiB")
    assert sum(statuses.values()) == count and not [status for status in statuses if status >= 500], statuses
    assert grown < GROWTH_LIMIT_KIB
    assert set(statuses) & {400, 413, 422}


def test_the_corpus_follows_from_its_seed_and_repeats_little() -> None:
    first = list(corpus(1, 500))
    assert first == list(corpus(1, 500)) != list(corpus(2, 500)) and len(set(first)) > 450


def test_no_log_tells_a_prompt_or_a_key(tmp_path: Path) -> None:
    """Every way that a prompt and a key can take through the service, good and bad, at the most talkative level."""
    canary = "kanarienvogel"
    _, text = KeyStore(tmp_path / "data").create("ann", ["generate", "read", "admin"])
    headers = {"Authorization": f"Bearer {text}"}
    with running_service(tmp_path / "data", LOG_LEVEL="debug", MAX_ATTEMPTS="1") as service:
        for word in ("", "fake:raise ", "fake:nan ", "fake:oom ", "fake:die "):
            call("POST", f"{service.url}/generate", headers=headers, json={"prompt": word + canary, "n": 3})
        for body in ({"prompt": canary, "stream": True}, {"prompt": [canary]}, {canary: 1}, {"prompt": canary * 1000}):
            call("POST", f"{service.url}/generate", headers=headers, json=body)
        asked = {"model": "fake", "prompt": canary, "size": "64x64"}
        call("POST", f"{service.url}/v1/images/generations", headers=headers, json=asked)
        call("GET", f"{service.url}/jobs?prompt={canary}", headers=headers)
        call("GET", f"{service.url}/jobs/{canary}", headers=headers)
        call("GET", f"{service.url}/jobs", headers={"Authorization": f"Bearer {text[:-1]}x"})
        call("GET", f"{service.url}/admin/dlq", headers=headers)
        with open_post(service.url, {"Authorization": f"Bearer {text}"}, prompt=f"fake:step=0.2 {canary}") as gone:
            gone.settimeout(PATIENCE_S)
        later = {**headers, "Prefer": "respond-async"}
        call("POST", f"{service.url}/generate", headers=later, json={"prompt": canary})
    report = service.output.read_text() + (tmp_path / "data" / "redis" / "server.log").read_text()
    assert "job settled" in report and canary not in report
    assert text.rpartition("_")[2] not in report and text not in report
