"""The secrets of a stack of containers: they open what they should, nobody chose them, and they stay what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from service.errors import StartupError
from service.keys import KeyStore
from service.supervise.first_start import prepare
from service.supervise.redis_server import find_program
from tests.service.support import REPOSITORY, clean_environment, eventually


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_first_start_makes_keys_that_open_what_they_should(tmp_path: Path) -> None:
    made = prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    store = KeyStore(tmp_path / "data")
    assert made.api_key and made.grafana_password
    first, metrics = store.find(made.api_key), store.find((tmp_path / "secrets/metrics/token").read_text())
    assert first and first.scopes == ("generate", "read", "admin")
    assert metrics and metrics.scopes == ("metrics",)
    assert (tmp_path / "secrets/grafana/password").read_text() == made.grafana_password
    assert made.api_key not in "".join(contents(tmp_path).values())


def test_a_second_start_changes_nothing_and_shows_nothing(tmp_path: Path) -> None:
    prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    before = contents(tmp_path)
    again = prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    assert (again.api_key, again.grafana_password) == (None, None)
    assert contents(tmp_path) == before


def test_a_start_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    before = contents(tmp_path / "secrets")
    (tmp_path / "secrets/queue/fewstep_redis_url").unlink()
    (tmp_path / "data/keys.json").unlink()
    made = prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    after, store = contents(tmp_path / "secrets"), KeyStore(tmp_path / "data")
    assert {name for name in after if after[name] != before[name]} == {"metrics/token"}
    assert store.find(after["metrics/token"]) and made.api_key and store.find(made.api_key)


def test_two_stacks_share_no_secret(tmp_path: Path) -> None:
    for name in "ab":
        prepare(tmp_path / name, tmp_path / name / "secrets", "valkey")
    assert not set(contents(tmp_path / "a").values()) & set(contents(tmp_path / "b").values()) - {""}


def test_the_password_opens_a_server_that_was_started_with_its_file(tmp_path: Path) -> None:
    prepare(tmp_path / "data", tmp_path / "secrets", "valkey")
    queue = tmp_path / "secrets/queue"
    url = (queue / "fewstep_redis_url").read_text()
    assert url == f"redis://:{(queue / 'password').read_text()}@valkey:6379"
    socket = tmp_path / "s"
    command = [find_program(), str(queue / "server.conf"), "--port", "0", "--unixsocket", str(socket), "--save", ""]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        eventually(socket.exists, "the server listens")
        with redis.Redis(unix_socket_path=str(socket)) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        with redis.Redis(unix_socket_path=str(socket), password=(queue / "password").read_text()) as owner:
            assert owner.ping()
    finally:
        server.terminate()
        server.wait(30)


def test_the_command_prints_the_key_once(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, "-m", "service.run", "init", str(tmp_path / "secrets")]
        environment = clean_environment({"DATA_DIR": str(tmp_path / "data")})
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
        ).stdout

    first = run()
    key = first.splitlines()[0].rpartition(" ")[2]
    assert KeyStore(tmp_path / "data").find(key)
    assert run() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StartupError, match="cannot be used: "):
        prepare(tmp_path / "data", tmp_path / "secrets", "valkey")


def test_any_user_may_read_a_secret_and_nobody_may_change_it(tmp_path: Path) -> None:
    """Each container mounts only its own folder, and runs as a user of its own."""
    prepare(tmp_path / "data", tmp_path / "secrets", "queue")
    files = [path for path in (tmp_path / "secrets").rglob("*") if path.is_file()]
    assert len(files) == 5 and {path.stat().st_mode & 0o777 for path in files} == {0o444}
