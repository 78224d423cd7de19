"""How serve starts its processes and how it ends them: with which words, in which environment, in which order."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.configuration import HIDDEN, effective
from service.errors import StartupError
from service.exposure import check_exposure
from service.keys import KeyStore
from service.settings import REPOSITORY, Settings
from service.supervise import supervisor as module
from service.supervise.redis_server import EmbeddedServer
from service.supervise.supervisor import Child, Supervisor


def supervisor(tmp_path: Path, address: str = "127.0.0.1", **settings: Any) -> Any:
    found: Any = Supervisor.__new__(Supervisor)
    found._settings = Settings(runtime="fake", data_dir=tmp_path, **settings)
    found._listener = SimpleNamespace(
        getsockname=lambda: (address, 8123, 0, 0), fileno=lambda: 17, close=lambda: found.ended.append("listener")
    )
    found.ended = []
    found._children = []
    found._workers = 3
    found._redis_url = "redis://queue"
    found._server = None
    return found


def spawned(scene: Any, monkeypatch: pytest.MonkeyPatch, child: Child) -> tuple[list[str], dict[str, Any]]:
    started: list[tuple[list[str], dict[str, Any]]] = []

    def spawn(command: list[str], **options: Any) -> Any:
        started.append((command, options))
        return SimpleNamespace(pid=4321)

    monkeypatch.setattr(module, "spawn", spawn)
    scene._children = [child]
    scene._spawn(child)
    return started[0]


def test_a_worker_has_a_name_of_its_own_and_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, child = supervisor(tmp_path), Child("worker")
    names = set()
    for _ in range(2):
        command, options = spawned(scene, monkeypatch, child)
        assert command == [sys.executable, "-m", "service.run", "worker", "--name", child.name]
        assert (options["pass_fds"], options["folder"]) == ([], REPOSITORY)
        names.add(child.name)
    assert len(names) == 2, "its jobs are known by it, and one that died has others"
    [_, running] = json.loads((tmp_path / "run.json").read_text())["processes"]
    assert running == {"role": "worker", "pid": 4321}


def test_every_process_that_runs_is_listed(tmp_path: Path) -> None:
    scene = supervisor(tmp_path)
    scene._server = SimpleNamespace(process=SimpleNamespace(pid=5))
    scene._children = [Child("api"), *(Child("worker") for _ in range(3))]
    for pid, child in enumerate(scene._children[:3], 6):
        child.process = SimpleNamespace(pid=pid)
    scene._write_run_file()
    found = json.loads((tmp_path / "run.json").read_text())
    listed = [("supervisor", os.getpid()), ("redis", 5), ("api", 6), ("worker", 7), ("worker", 8)]
    assert found["processes"] == [{"role": role, "pid": pid} for role, pid in listed] and found["url"] == scene.url


@pytest.mark.parametrize(("apis", "part"), [(1, []), (2, ["--part", "1"])])
def test_an_http_process_inherits_the_socket(
    apis: int, part: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, options = spawned(supervisor(tmp_path, apis=apis), monkeypatch, Child("api", part=1))
    assert command == [sys.executable, "-m", "service.run", "api", "--listener", "17", *part]
    assert options["pass_fds"] == [17]


def test_children_are_told_what_only_their_parent_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEWSTEP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEWSTEP_QUOTA", "3")
    scene = supervisor(tmp_path, insecure=True, c2pa_cert=tmp_path / "cert.pem", model=tmp_path / "student")
    told = {name: value for name, value in scene._environment(Child("worker")).items() if name.startswith("FEWSTEP_")}
    assert told == {
        "FEWSTEP_QUOTA": "3", "FEWSTEP_REDIS_URL": "redis://queue", "FEWSTEP_DATA_DIR": str(tmp_path),
        "FEWSTEP_MODEL": str(tmp_path / "student"), "FEWSTEP_WORKERS": "3", "FEWSTEP_INSECURE": "true",
        "FEWSTEP_C2PA_CERT": str(tmp_path / "cert.pem"),
    }  # fmt: skip
    several = supervisor(tmp_path, models=tmp_path / "students")._environment(Child("api"))
    assert several["FEWSTEP_MODELS"] == str(tmp_path / "students") and "FEWSTEP_MODEL" not in several
    assert several["FEWSTEP_INSECURE"] == "false"


def test_a_childs_gpu_and_relative_secrets_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_SECRETS_DIR", "secrets")
    monkeypatch.delenv(module.VISIBLE, raising=False)
    scene = supervisor(tmp_path)
    told = scene._environment(Child("worker", gpu="GPU-1"))
    assert (told["FEWSTEP_SECRETS_DIR"], told["CUDA_VISIBLE_DEVICES"]) == (str(tmp_path / "secrets"), "GPU-1")
    assert "CUDA_VISIBLE_DEVICES" not in scene._environment(Child("worker"))


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("192.0.2.1", "http://192.0.2.1:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("::", "http://[::1]:8123"),
        ("::1", "http://[::1]:8123"),
    ],
)
def test_the_address_that_is_printed_can_be_opened(address: str, url: str, tmp_path: Path) -> None:
    assert supervisor(tmp_path, address).url == url


def test_clients_are_answered_before_workers_end_and_the_queue_ends_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has as long as its own stop takes, and a margin: 3 s in which it still accepts, 1.5 s for what runs."""
    scene = supervisor(tmp_path, drain_s=3.0, grace_s=1.5)
    kinds = {"an api": Child("api"), "a worker": Child("worker"), "another": Child("worker")}
    for name, child in kinds.items():
        child.process = name  # type: ignore[assignment]
    scene._children = [*kinds.values(), Child("worker")]
    scene._server = SimpleNamespace(stop=lambda: scene.ended.append("queue"))
    scene._lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(module, "stop", lambda found, grace_s: scene.ended.append((found, pytest.approx(grace_s))))
    scene._stop()
    assert scene.ended == ["listener", (["an api"], 3.0 + 2 + 1.2), (["a worker", "another"], 1.5 + 0.6), "queue"]
    assert not (tmp_path / "run.json").exists()


def test_the_queues_server_keeps_every_job_and_listens_to_its_owner_alone(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "redis")
    arguments = server._arguments()
    os.close(server._lock)
    assert dict(zip(arguments[::2], arguments[1::2], strict=True)) == {
        "--port": "0", "--unixsocket": str(server.socket), "--unixsocketperm": "700", "--dir": str(tmp_path / "redis"),
        "--appendonly": "yes", "--appendfsync": "everysec", "--save": "", "--maxmemory": "512mb",
        "--maxmemory-policy": "noeviction", "--daemonize": "no",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "settings", "keys", "served"),
    [
        ("127.0.0.1", {}, "none", True),
        ("127.8.8.8", {}, "none", True),
        ("::1", {}, "none", True),
        ("fe80::1%lo", {}, "none", False),
        ("0.0.0.0", {}, "none", False),
        ("192.0.2.1", {}, "none", False),
        ("192.0.2.1", {}, "revoked", False),
        ("192.0.2.1", {}, "one", True),
        ("192.0.2.1", {"insecure": True}, "none", True),
        ("127.0.0.1", {"public_url": "https://a.example"}, "none", False),
        ("127.0.0.1", {"public_url": "https://a.example"}, "revoked", False),
        ("127.0.0.1", {"public_url": "https://a.example"}, "one", True),
        ("127.0.0.1", {"public_url": "https://a.example", "insecure": True}, "none", True),
    ],
)
def test_where_other_machines_come_a_key_is_needed(
    address: str, settings: dict[str, Any], keys: str, served: bool, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path)
    if keys != "none":
        id = store.create("ann")[0].id
        if keys == "revoked":
            store.revoke(id)
    try:
        check_exposure(Settings(runtime="fake", **settings), address, store)
    except StartupError as error:
        assert not served and "fewstep keys create" in str(error)
    else:
        assert served


def test_the_configuration_that_is_shown_has_no_secret() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    shown = effective(Settings(runtime="fake", webhook_secret=secret, results="redis://:canary@r", port=1))  # type: ignore[arg-type]
    assert shown["webhook_secret"] == HIDDEN == "***" and "canary" not in shown["results"] and shown["port"] == 1
    assert effective(Settings(runtime="fake"))["webhook_secret"] is None, "whether there is one can be seen"
