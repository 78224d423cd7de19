"""The embedded server: which program, where its socket lies, what it keeps, when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import StartupError
from service.queue.connection import connect
from service.supervise import redis_server
from service.supervise.redis_server import EmbeddedServer, find_program, program_version, socket_path
from tests.service.support import REPOSITORY, alive, eventually


def script(folder: Path, name: str, version: str) -> Path:
    """A program that says that it is this version."""
    program = folder / name
    program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64'\n")
    program.chmod(0o755)
    return program


def test_the_bundled_program_is_a_real_server_that_is_new_enough() -> None:
    program = redis_server._bundled_program()
    assert program and program_version(program) >= (7, 0)


@pytest.mark.parametrize(("version", "taken"), [("7.0.15", True), ("9.1.2", True), ("6.2.14", False), ("6", False)])
def test_a_program_on_path_is_taken_only_if_it_is_new_enough(
    version: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(tmp_path, "redis-server", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (find_program() == program) is taken


def test_valkey_on_path_is_taken_when_redis_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "redis-server", "6.0.16")
    program = script(tmp_path, "valkey-server", "8.0.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program() == program


def test_no_program_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "_bundled_program", lambda: None)
    with pytest.raises(StartupError, match="FEWSTEP_REDIS_URL"):
        find_program()


def test_a_program_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "data", program=script(tmp_path, "redis-server", "7.0.15"))
    with pytest.raises(StartupError, match=r"ended with code 0; see .*server\.log"):
        server.start()
    server.stop()


def test_it_is_reachable_by_its_socket_alone_and_never_drops_data(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "data")
    server.start()
    try:
        client = connect(server.url)
        wanted = {"port": "0", "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert int(client.config_get("maxmemory")["maxmemory"]) == 512 * 2**20  # it does not take all of the machine's
        assert server.socket.stat().st_mode & 0o077 == 0
    finally:
        server.stop()
    assert not server.socket.exists()


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "data")
    server.start()
    client = connect(server.url)
    for number in range(100):
        client.rpush("numbers", number)
    assert server.process
    server.process.kill()
    server.process.wait()
    server.start()
    assert client.lrange("numbers", 0, -1) == [str(number) for number in range(100)]
    server.stop()


def test_a_long_path_with_spaces_gets_a_short_private_socket(tmp_path: Path) -> None:
    folder = tmp_path / "a directory with spaces" / ("long" * 30)
    server = EmbeddedServer(folder)
    server.start()
    try:
        assert len(os.fsencode(server.socket)) <= 107 and server.socket.parent != folder
        assert server.socket.parent.stat().st_mode & 0o077 == 0
        client = connect(server.url)
        client.set("here", "1")
        assert (folder / "appendonlydir").is_dir()
    finally:
        server.stop()


def test_a_short_path_with_a_space_keeps_the_socket_inside(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "a b")
    server.start()
    try:
        assert server.socket.parent == tmp_path / "a b" and connect(server.url).ping()
    finally:
        server.stop()


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"fewstep-{os.getuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(StartupError, match="FEWSTEP_DATA_DIR"):
        socket_path(Path("/" + "long" * 40))


def test_one_folder_serves_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "LOCK_TIMEOUT_S", 0.05)
    server = EmbeddedServer(tmp_path / "data")
    server.start()
    with pytest.raises(StartupError, match="already uses"):
        EmbeddedServer(tmp_path / "data")
    server.stop()
    again = EmbeddedServer(tmp_path / "data")
    again.start()
    again.stop()


PARENT = """
import sys
from pathlib import Path
from service.supervise.redis_server import EmbeddedServer

server = EmbeddedServer(Path(sys.argv[1]))
server.start()
print(server.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_gone_when_its_parent_is_and_the_folder_is_free_again(death: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        connect(f"unix://{folder}/redis.sock").set("kept", "yes")
        parent.send_signal(death)
    eventually(lambda: not alive(pid), "the server is gone")
    server = EmbeddedServer(folder)
    server.start()
    assert connect(server.url).get("kept") == "yes"
    server.stop()
