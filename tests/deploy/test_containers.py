"""What the test of the containers checks, on an engine of which each answer is known: it must see what is wrong."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import threading
import urllib.error
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import base_image, docker_test, engine, stack
from deploy.engine import Engine, NoEngine
from deploy.stack import Stack, expect

PNG = b"\x89PNG\r\n\x1a\nrest"


def answer(seed: int = 7, data: bytes = PNG, sha256: str | None = None) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    return {"data": [{"b64_json": base64.b64encode(data).decode(), "sha256": digest, "seed": seed}]}


class Docker:
    """An engine whose answers are by the words of a command; the first whose words all occur holds."""

    compose = ("docker", "compose")

    def __init__(self, *answers: tuple[str, str]) -> None:
        self.environment: dict[str, str] = {}
        self.asked: list[str] = []
        self._answers = answers

    def run(self, *command: str, check: bool = True) -> str:
        line = " ".join(command)
        self.asked.append(line)
        return next((said for words, said in self._answers if all(word in line for word in words.split())), "")


def a_stack(*answers: tuple[str, str], services: tuple[str, ...] = ("api", "worker")) -> tuple[Any, Stack]:
    docker: Any = Docker(*answers)
    return docker, Stack(docker, ["a.yml", "b.yml"], list(services))


def test_a_picture_is_the_one_that_was_asked_for_and_announced() -> None:
    assert docker_test.check_picture(answer(), 7) == hashlib.sha256(PNG).hexdigest()
    for wrong in (answer(8), answer(data=b"JFIF"), answer(sha256="0" * 64)):
        with pytest.raises(SystemExit, match="docker-test: "):
            docker_test.check_picture(wrong, 7)
    with pytest.raises(ValueError, match="too many values"):
        docker_test.check_picture({"data": answer()["data"] * 2}, 7)
    expect(True, "not said")


def test_a_stack_is_its_files_under_a_name_of_its_own() -> None:
    docker, found = a_stack(("ps -q worker", "one\ntwo"))
    assert found.containers("worker") == ["one", "two"] and found.container("worker") == "one"
    assert docker.asked[0] == "docker compose --project-name fewstep-test -f a.yml -f b.yml ps -q worker"


def test_the_first_start_prints_one_key() -> None:
    keys = [f"fewstep_{'0123456789ab'}_{digit * 48}" for digit in "ab"]
    assert a_stack(("logs init", f"init-1 | API key: {keys[0]}\n"))[1].key() == keys[0]
    for printed in ("", "\n".join(keys)):
        with pytest.raises(SystemExit, match="printed [02] keys"):
            a_stack(("logs init", printed))[1].key()


def test_it_is_waited_until_all_are_healthy_and_as_many_are_ready_as_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(stack, "time", clock)
    monkeypatch.setattr(stack, "ready_workers", lambda: 1 + int(now[0] / 10))
    docker, found = a_stack(
        ("ps -q api", "first-id"), ("ps -q worker", "second-id"), ("inspect Health first-id", "healthy"),
        ("inspect Health second-id", "starting"), ("logs tail", "the last lines"),
    )  # fmt: skip
    found.wait_until_ready()
    assert now == [0.0]
    found.wait_until_ready(3)
    assert now == [20.0]
    with pytest.raises(SystemExit, match="docker-test: worker: not healthy after 300 s"):
        found.wait_until_healthy()
    assert 320 < now[0] < 322 and "the last lines" in capsys.readouterr().out
    monkeypatch.setattr(stack, "queries", lambda gpus: [] if not gpus else ["no GPU is there"])
    found.wait_for_data()


class Opener:
    """Answers each address with a body, or with an exception."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def open(self, asked: Any, timeout: float) -> Any:
        url = asked if isinstance(asked, str) else asked.full_url
        found = next(found for part, found in self._answers.items() if part in url)
        if isinstance(found, Exception):
            raise found
        return io.BytesIO(json.dumps(found).encode())


def test_what_does_not_answer_yet_has_no_worker_and_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    away = urllib.error.URLError("refused")
    monkeypatch.setattr(stack, "DIRECT", Opener({"/readyz": away, "/api/v1/query": away}))
    assert stack.ready_workers() == 0 and stack.ask_prometheus("up") == []
    sample = {"metric": {}, "value": [0, "1"]}
    there = Opener({"/readyz": {"workers": 3}, "/api/v1/query?query=a+%2B+b": {"data": {"result": [sample]}}})
    monkeypatch.setattr(stack, "DIRECT", there)
    assert stack.ready_workers() == 3 and stack.ask_prometheus("a + b") == [sample]
    refused = urllib.error.HTTPError("u", 401, "", {}, None)  # type: ignore[arg-type]
    monkeypatch.setattr(docker_test, "DIRECT", Opener({"/generate": refused}))
    assert docker_test.status_without_key() == 401


def test_images_are_small_and_hold_nothing_of_their_build() -> None:
    def check(api: str, worker: str = "499000000", found: str = "[]") -> None:
        docker: Any = Docker(
            ("inspect Size base", "100000000"), ("inspect Size fewstep-api", api),
            ("inspect Size fewstep-worker", worker), ("run fewstep-api", found), ("run fewstep-worker", "[]"),
        )  # fmt: skip
        docker_test.check_images(docker, "base")

    with pytest.raises(SystemExit, match="fewstep-api adds 300 MB to its base; 300 MB are allowed"):
        check("400000000")
    with pytest.raises(SystemExit, match="fewstep-worker-cpu adds 401 MB"):
        check("399000000", "501000000")
    check("399000000")
    with pytest.raises(SystemExit, match=r"fewstep-api holds \['torch'\]"):
        check("399000000", found="['torch']")
    with pytest.raises(SystemExit, match="history contains pip's settings"):
        docker: Any = Docker(
            ("inspect Size", "100"), ("history fewstep-api", "RUN PIP_INDEX_URL=x"), ("run fewstep", "[]")
        )
        docker_test.check_images(docker, "base")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ((), None),
        (("exec worker id", "0"), "worker runs as user 0"),
        (("exec api sh", "written"), "api can write to its own code"),
        (("PortBindings valkey", '{"6379/tcp": []}'), "the queue is published"),
    ],
)
def test_containers_run_as_nobody_and_the_queue_is_not_published(changed: tuple[str, str], said: str | None) -> None:
    usual = [(f"ps -q {name}", name) for name in ("api", "worker", "valkey")]
    usual += [("id -u", "10001"), ("PortBindings", "{}")]
    docker, found = a_stack(*([changed] if changed else []), *usual, services=("valkey", "api", "worker"))
    if said is None:
        docker_test.check_containers(docker, found)
        return
    with pytest.raises(SystemExit, match=said):
        docker_test.check_containers(docker, found)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ((), None),
        (("history worker-image", "ENV PASSWORD=secret-of-valkey"), "worker's image or description contains a secret"),
        (("inspect prometheus", "the key"), "prometheus's image or description contains a secret"),
        (("exec worker ls", "token"), "the worker holds the secrets of others"),
        (("exec worker ls", "password"), "the worker holds the secrets of others"),
    ],
)
def test_no_secret_is_in_an_image_or_with_whom_it_is_not_for(changed: tuple[str, str], said: str | None) -> None:
    services = ("valkey", "api", "worker", "prometheus")
    usual = [(f"ps -q {name}", name) for name in services]
    usual += [(f"inspect -f {name}", f"{name}-image") for name in services]
    usual += [(f"exec {name} cat", f"secret-of-{name}") for name in ("valkey", "prometheus")]
    docker, found = a_stack(*([changed] if changed else []), *usual, services=services)
    if said is None:
        docker_test.check_secrets(docker, found, "the key")
        assert not [line for line in docker.asked if "grafana/password" in line and "cat" in line], "it does not run"
        return
    with pytest.raises(SystemExit, match=said):
        docker_test.check_secrets(docker, found, "the key")


def test_under_load_a_worker_is_killed_and_every_request_is_answered_with_its_own_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, count = threading.Lock(), [0]
    odd: dict[int, Any] = {}

    def draw(seed: int, key: str) -> dict[str, Any]:
        assert key == "key"
        with lock:
            count[0] += 1
            again = count[0] > 3
        return odd[seed] if again and seed in odd else answer(seed, PNG + bytes([seed % 250]))

    monkeypatch.setattr(docker_test, "draw", draw)
    docker, found = a_stack(("ps -q worker", "w"))
    docker_test.check_kill(docker, found, "key")
    killed = docker.asked.index("docker kill --signal KILL w")
    assert docker.asked[killed + 1] == "docker start w" and "requests answered" in capsys.readouterr().out
    count[0] = 0
    odd[2] = answer(2, PNG + b"another")
    with pytest.raises(SystemExit, match="other bytes for the same seed"):
        docker_test.check_kill(docker, found, "key")
    count[0], odd[2] = 0, answer(3)
    with pytest.raises(SystemExit, match="asked for seed 2, got 3"):
        docker_test.check_kill(docker, found, "key")


def test_answers_are_waited_for_until_there_are_enough_or_a_client_has_failed() -> None:
    running, failed = Future[None](), Future[None]()
    failed.set_exception(ValueError())
    assert docker_test.wait_for_answers({1: "", 2: ""}, [running], 2) == 2
    assert docker_test.wait_for_answers({1: ""}, [running, failed], 2) == 1


def test_all_workers_must_have_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_test, "draw", lambda seed, key: answer(seed))
    monkeypatch.setattr(stack, "ready_workers", lambda: docker_test.WORKERS)
    lines = [f"worker-{k}  | generated 1 of 1 jobs" for k in (1, 2, 3)]
    for logs, containers, said in (
        (lines, "a\nb\nc", None), (lines[:2], "a\nb\nc", "only .*worker-2.* drew"), (lines, "a\nb", "not 3 workers"),
    ):  # fmt: skip
        _, found = a_stack(("logs worker", "\n".join(logs)), ("ps -q worker", containers))
        if said is None:
            docker_test.check_shared_load(found, "key")
            continue
        with pytest.raises(SystemExit, match=said):
            docker_test.check_shared_load(found, "key")


def test_an_engine_is_the_one_that_runs_or_it_is_said_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed, answers, root = {"docker"}, [True], [0]
    started = list[Path]()

    def daemon(folder: Path, data: Path) -> Any:
        started.append(data)
        return engine.contextmanager(lambda: iter([tmp_path / "s.sock"]))()

    monkeypatch.setattr(engine.shutil, "which", lambda name: name if name in installed else None)
    monkeypatch.setattr(engine, "_answers", lambda found: answers[0])
    monkeypatch.setattr(engine.os, "geteuid", lambda: root[0])
    monkeypatch.setattr(engine, "_daemon", daemon)
    with engine.engine({"A": "b"}, None) as found:
        assert found == Engine({"A": "b"}) and not started
    answers[0] = False
    for programs, user in (({"docker"}, 0), ({"docker", "dockerd"}, 1000), (set[str](), 0)):
        installed, root[0] = programs, user
        with pytest.raises(NoEngine), engine.engine({}, None):
            pass
    installed, root[0] = {"docker", "dockerd"}, 0
    with engine.engine({"A": "b"}, tmp_path / "data") as found:
        assert found.environment == {"A": "b", "DOCKER_HOST": f"unix://{tmp_path}/s.sock"}
    assert started == [tmp_path / "data"]


@pytest.mark.parametrize(
    ("plugin", "older", "command"), [(0, True, ("docker", "compose")), (1, True, ("docker-compose",)), (1, False, None)]
)
def test_compose_is_the_plugin_or_the_older_program(
    plugin: int, older: bool, command: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=plugin))
    monkeypatch.setattr(engine.shutil, "which", lambda name: name if older else None)
    if command is None:
        with pytest.raises(NoEngine, match="docker compose is not installed"):
            _ = Engine({}).compose
    else:
        assert Engine({}).compose == command


def test_a_command_has_the_engines_environment_and_its_failure_is_one_unless_that_is_allowed() -> None:
    found = Engine({"PATH": "/usr/bin:/bin", "SAID": "yes"})
    assert found.run("sh", "-c", "echo $SAID; echo no >&2") == "yes"
    with pytest.raises(subprocess.CalledProcessError):
        found.run("false")
    assert found.run("sh", "-c", "echo said; false", check=False) == "said"


def test_a_base_image_is_made_once_where_a_cache_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = list[Path]()
    monkeypatch.setattr(base_image.shutil, "which", lambda name: None)
    with pytest.raises(NoEngine, match="debootstrap is not installed"):
        base_image.make_base_images(Docker(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(base_image.shutil, "which", lambda name: name)
    monkeypatch.setattr(base_image, "_bootstrap", lambda root, archive: made.append(archive) or archive.touch())
    names = ("fewstep-base:bookworm", "fewstep-build-base:bookworm")
    both = [(f"images {name}", "id") for name in names]
    for there, cache, bootstrapped in (
        (both, tmp_path, 0),
        (both[:1], tmp_path, 1),
        ([], tmp_path, 1),
        (both, None, 2),
    ):
        docker = Docker(*there)
        assert base_image.make_base_images(docker, cache) == names  # type: ignore[arg-type]
        assert len(made) == bootstrapped and any("import" in line for line in docker.asked) is (
            there != both or not cache
        )
    assert made[0] == tmp_path / "bookworm.tar" and made[1].name == "bookworm.tar"
