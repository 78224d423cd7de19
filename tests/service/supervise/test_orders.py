"""A real worker is paused, resumed and drained: by HTTP, by the command line, beside a stop, and under a supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from service.queue.status import DRAINED
from tests.service.http.test_http import check_error
from tests.service.students import make_student
from tests.service.support import (
    PATIENCE_S,
    Api,
    call,
    eventually,
    running_service,
    start_worker,
)

LATER = {"Prefer": "respond-async"}
QUICK = {"LEASE_S": "0.6"}


def workers(url: str) -> list[dict[str, Any]]:
    return list(call("GET", f"{url}/admin/workers").json()["data"])


def wait_for(url: str, state: str) -> dict[str, Any]:
    return eventually(lambda: next((each for each in workers(url) if each["state"] == state), {}), state)


def order(url: str, id: str, what: str) -> dict[str, Any]:
    answer = call("POST", f"{url}/admin/workers/{id}/{what}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def later(url: str, prompt: str) -> str:
    return str(call("POST", f"{url}/generate", headers=LATER, json={"prompt": prompt}).json()["id"])


def status(url: str, id: str) -> str:
    return str(call("GET", f"{url}/jobs/{id}").json()["status"])


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_a_paused_worker_stays_claims_nothing_says_so_and_goes_on(
    make_api: Callable[..., Api], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = make_api()
    process = start_worker(api.redis_url, tmp_path / "data", **QUICK)
    try:
        id = wait_for(api.url, "ready")["id"]
        mine, its = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getpid(), process.pid))
        assert its == min(19, mine + 10), "it gives way to the HTTP process"
        assert order(api.url, id, "pause")["state"] == "paused"
        job = later(api.url, "p")

        def heard() -> bool:
            said = json.loads(str(api.redis.get(f"{api.prefix}wi:{id}") or "{}"))
            return said.get("state") == "paused"

        eventually(heard, "the worker says in its heartbeat that it is paused")
        assert status(api.url, job) == "queued" and api.hash_of(job)["attempts"] == "0" and process.poll() is None
        metrics = call("GET", f"{api.url}/metrics").text
        assert 'fewstep_worker_states{state="paused"} 1.0' in metrics
        assert 'fewstep_worker_states{state="ready"} 0.0' in metrics
        message = check_error(call("GET", f"{api.url}/readyz"), 503, "unavailable")
        assert message == "Every worker that has loaded fake/1 is paused or draining."
        row = command(capsys, api.url, "list")[1].splitlines()[1].split()
        assert [row[0], *row[2:]] == [id, "paused", "0", "fake", "fake/1"]
        assert command(capsys, api.url, "resume", id) == (0, f"{id} is ready and takes work.\n", "")
        eventually(lambda: status(api.url, job) == "done", "it goes on")
        assert call("GET", f"{api.url}/readyz").status_code == 200
    finally:
        end(process)


def test_a_worker_that_waits_for_nothing_takes_nobodys_wake_up(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api()
    process = start_worker(api.redis_url, tmp_path / "data", **QUICK)
    try:
        id = wait_for(api.url, "ready")["id"]
        order(api.url, id, "pause")
        eventually(lambda: not _blocked(api), "it waits at the queue no more")
        later(api.url, "p")
        assert api.redis.llen(f"{api.prefix}w:3|fake|1") == 1
    finally:
        end(process)


def _blocked(api: Api) -> int:
    return int(api.redis.info("clients")["blocked_clients"]) - 1  # the HTTP process waits for news, too


def test_a_worker_that_is_not_there_is_told_nothing(make_api: Callable[..., Api]) -> None:
    api = make_api()
    for what in ("pause", "resume", "drain"):
        message = check_error(call("POST", f"{api.url}/admin/workers/nobody/{what}"), 404, "not_found")
        assert message == "There is no such worker, or it has given no sign of life lately."
    assert workers(api.url) == []


def test_a_drained_worker_ends_what_it_holds_and_serve_starts_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_service(tmp_path / "data", LEASE_S="5") as service:
        url, pid = service.url, service.pids()["worker"]
        id = wait_for(url, "ready")["id"]
        held = later(url, "fake:sleep=1 held")
        eventually(lambda: status(url, held) == "running", "it draws")
        os.kill(pid, signal.SIGSTOP)  # so that it has not ended before all is said
        assert command(capsys, url, "drain", id) == (0, f"{id} is draining: it finishes its jobs and ends.\n", "")
        waits = later(url, "waits")
        for refused in ("resume", "pause"):
            code, _, why = command(capsys, url, refused, id)
            assert (code, why) == (3, "fewstep: The worker is draining: it ends when it has generated what it holds.\n")
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: status(url, held) == "done", "what it held is drawn")
        eventually(lambda: "worker" not in service.pids(), "its process has ended")
        said = f"worker process {pid} ended with code {DRAINED}; an operator has drained it"
        eventually(lambda: said in service.output.read_text(), "the supervisor says why")
        time.sleep(0.5)  # longer than the pause before a dead process is started again
        assert "worker" not in service.pids() and "it is restarted" not in service.output.read_text()
        assert status(url, waits) == "queued" and command(capsys, url, "list")[1] == "No worker is alive.\n"
        assert call("GET", f"{url}/readyz").status_code == 503


def test_a_worker_that_drains_can_be_stopped_as_any_other(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api()
    process = start_worker(api.redis_url, tmp_path / "data", GRACE_S="0", **QUICK)
    try:
        id = wait_for(api.url, "ready")["id"]
        held = later(api.url, "fake:sleep=20 held")
        eventually(lambda: status(api.url, held) == "running", "it draws")
        order(api.url, id, "drain")
        eventually(lambda: "draining" in str(api.redis.get(f"{api.prefix}wi:{id}")), "it knows")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert status(api.url, held) == "queued" and api.hash_of(held)["attempts"] == "0"
    finally:
        end(process)


def test_a_worker_says_that_it_loads_until_it_holds_a_student(make_api: Callable[..., Api], tmp_path: Path) -> None:
    """Several students: it waits for an HTTP process to say which."""
    make_student(tmp_path / "models", "cats", "1")
    several = {"MODELS": str(tmp_path / "models"), "LEASE_S": "0.6"}
    api = make_api()  # serves another queue
    process = start_worker(api.redis_url, tmp_path / "data", **several)
    try:
        eventually(lambda: '"state": "loading"' in _said(api), "it says that it loads")
        make_api(**several)
        eventually(lambda: '"state": "ready"' in _said(api), "it says that it is ready")
    finally:
        end(process)


def _said(api: Api) -> str:
    return "".join(str(api.redis.get(key)) for key in api.redis.scan_iter("fewstep:*:wi:*"))


def command(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str, str]:
    """``fewstep workers``, in this process: exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        main(["workers", *arguments, "--url", url])
    output = capsys.readouterr()
    return int(str(ended.value.code)), output.out, output.err
