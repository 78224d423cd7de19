"""The service's command line: what each command starts, with which arguments, and with which exit code it ends."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from service import run
from service.errors import StartupError
from service.settings import Settings

Done = list[tuple[Any, ...]]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Done:
    """What is done, in order, in place of starting anything."""
    done: Done = []

    def noting(place: str, word: str, answer: Any = None) -> None:
        monkeypatch.setattr(place, lambda *arguments: done.append((word, *arguments)) or answer)

    settings = Settings(runtime="fake", data_dir=tmp_path, host="127.0.0.9", port=8123)
    monkeypatch.setattr(run, "read_settings", lambda: settings)
    monkeypatch.setattr(run, "configure_logging", lambda found: done.append(("logs", found.insecure)))
    serving = SimpleNamespace(run=lambda: done.append(("serve",)))
    noting("service.supervise.supervisor.Supervisor", "made", serving)
    noting("service.configuration.check_configuration", "check", {"port": 8123})
    noting("service.http.server.run_server", "api")
    noting("service.listener.listen", "listen", "a new socket")
    noting("service.observe.shared.share_counts", "share")
    noting("service.worker.process.run_worker", "worker", 6)
    noting("service.supervise.probe.find_worker", "probe")
    monkeypatch.setattr(run.os, "nice", lambda by: done.append(("nice", by)))
    return done


def ran(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(run.app, list(arguments))
    return found.exit_code, found.stdout


@pytest.mark.parametrize(
    ("arguments", "insecure"),
    [((), False), (("--insecure",), True), (("serve",), False), (("serve", "--insecure"), True)],
)
def test_without_a_command_it_serves(arguments: tuple[str, ...], insecure: bool, done: Done) -> None:
    assert ran(*arguments) == (0, "")
    logs, (_, settings), served = done
    assert logs == ("logs", insecure) and settings.insecure is insecure and served == ("serve",)


@pytest.mark.parametrize("arguments", [("--check-config",), ("serve", "--check-config")])
def test_a_configuration_that_is_checked_is_printed_and_not_served(arguments: tuple[str, ...], done: Done) -> None:
    code, said = ran(*arguments)
    assert (code, json.loads(said)) == (0, {"port": 8123}) and [word for word, *_ in done] == ["logs", "check"]


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("option", [False, True])
def test_it_is_insecure_where_the_variable_or_the_option_says_so(
    variable: bool, option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()
    monkeypatch.setattr(run, "read_settings", lambda: Settings(runtime="fake", insecure=variable))
    monkeypatch.setattr(run, "configure_logging", lambda _: None)
    run._with_settings(lambda settings: seen.append(settings.insecure), option)
    assert seen == [variable or option]


@pytest.mark.parametrize("part", [None, 0, 1])
def test_of_several_http_processes_each_shares_what_it_counts_the_first_one_too(
    part: int | None, done: Done, tmp_path: Path
) -> None:
    assert ran("api", *([] if part is None else ["--part", str(part)]))[0] == 0
    shared = [] if part is None else [("share", tmp_path / "counts", part)]
    assert done[1 : 1 + len(shared)] == shared, "before anything is counted"
    (listen, (_, settings, found)) = done[1 + len(shared) :]
    assert listen == ("listen", "127.0.0.9", 8123) and found == "a new socket" and settings.data_dir == tmp_path


def test_an_http_process_takes_the_socket_that_it_inherits(done: Done) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address, number = listener.getsockname(), listener.detach()
        assert ran("api", "--listener", str(number), "--insecure")[0] == 0
    (_, settings, found) = done[-1]
    assert found.getsockname() == address and settings.insecure and [word for word, *_ in done] == ["logs", "api"]
    found.close()


def test_a_worker_gives_way_to_others_has_a_name_of_its_own_and_ends_with_its_code(done: Done) -> None:
    assert [ran("worker")[0] for _ in range(2)] == [6, 6] and ran("worker", "--name", "w")[0] == 6
    names = [arguments[-1] for word, *arguments in done if word == "worker"]
    assert names[2] == "w" and len({*names}) == 3 and all(names)
    assert [by for word, *by in done if word == "nice"] == [[10]] * 3


def test_a_container_asks_for_workers_of_its_own_host(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.socket, "gethostname", lambda: "here")
    assert ran("probe")[0] == 0 and done[-1][0] == "probe" and done[-1][2] == "here"


@pytest.mark.parametrize(
    ("key", "password", "said"),
    [(None, None, ""), ("k", None, "API key (shown only once; fewstep keys create creates more): k\n"),
     (None, "p", "Grafana: user admin, password p\n")],
)  # fmt: skip
def test_what_was_made_for_people_is_printed(
    key: str | None, password: str | None, said: str, done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prepare(*arguments: Any) -> Any:
        done.append(("prepare", *arguments))
        return SimpleNamespace(api_key=key, grafana_password=password)

    monkeypatch.setattr("service.supervise.first_start.prepare", prepare)
    assert ran("init", "secrets") == ran("init", "secrets", "--queue-host", "queue.example") == (0, said)
    assert done[1::2] == [("prepare", tmp_path, Path("secrets"), host) for host in ("valkey", "queue.example")]


def test_what_cannot_start_says_why_and_ends_with_1(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Settings) -> None:
        raise StartupError("No.")

    with pytest.raises(SystemExit) as ended:
        run._with_settings(refuse)
    assert ended.value.code == run.REFUSED == 1 and capsys.readouterr().err == "fewstep: No.\n"
