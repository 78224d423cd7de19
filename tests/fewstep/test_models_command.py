"""``fewstep models`` against a whole service with several students."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.service.students import make_student
from tests.service.support import REPOSITORY, Service, clean_environment, eventually, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("command")
    for version in ("1", "2"):
        make_student(folder / "models", "cats", version)
    (folder / "models" / "cats" / "1" / "transformer" / "weights.safetensors").write_bytes(b"changed")
    make_student(folder / "models", "cats", "0")
    with running_service(folder / "data", MODELS=str(folder / "models")) as running:
        eventually(lambda: run(running.url, "list").stdout.count("serving") == 1, "it is served")
        yield running


def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fewstep.cli", "models", *arguments, "--url", url]
    return subprocess.run(command, cwd=REPOSITORY, env=clean_environment({}), capture_output=True, text=True)


def test_a_student_is_loaded_promoted_and_the_old_one_unloaded(service: Service) -> None:
    assert run(service.url, "list").stdout.splitlines() == [
        "MODEL  VERSION  STATE              WORKERS  REASON",
        "cats   0        available          0",
        "cats   1        available          0",
        "cats   2        serving    latest  1",
    ]
    assert run(service.url, "load", "cats", "0").stdout == "cats 0 is serving.\n"
    assert run(service.url, "promote", "cats", "0").stdout == "cats 0 is serving and its model's latest version.\n"
    assert json.loads(run(service.url, "unload", "cats", "2", "--json").stdout)["state"] == "unloaded"


def test_a_canary_is_started_listed_and_stopped(service: Service) -> None:
    assert run(service.url, "canaries").stdout == "There was no canary yet.\n"
    latest = next(line.split()[1] for line in run(service.url, "list").stdout.splitlines() if "latest" in line)
    other = "2" if latest == "0" else "0"
    started = run(service.url, "canary", "cats", other, "--share", "0.5")
    assert started.stdout == f"cats {other} against {latest}: running; 0 pairs.\n", started.stderr
    again = run(service.url, "canary", "cats", other)
    assert again.returncode == 3 and "Another canary of cats is running: stop it first." in again.stderr
    stopped = f"cats {other} against {latest}: stopped (by the operator); 0 pairs.\n"
    assert run(service.url, "canary", "cats", other, "--stop").stdout == stopped
    assert run(service.url, "canaries").stdout == stopped
    assert json.loads(run(service.url, "canaries", "--json").stdout)["data"][0]["share"] == 0.5


def test_a_refusal_is_one_sentence_and_a_code(service: Service) -> None:
    done = run(service.url, "load", "cats", "1")
    assert (done.returncode, done.stdout) == (3, "") and done.stderr.startswith("fewstep: cats/1 is refused: ")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    missing = run(service.url, "promote", "cats", "7", "--json")
    assert missing.returncode == 5 and json.loads(missing.stderr)["error"]["code"] == "model_not_found"
    away = run("http://127.0.0.1:1", "list")
    assert away.returncode == 9 and len(away.stderr.splitlines()) == 1
    assert away.stderr.startswith("fewstep: The service cannot be reached at http://127.0.0.1:1: ")
