"""The command line in odd surroundings: encodings, full disks, proxies, certificates, addresses. Always a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.client import Client
from fewstep.connection import connection
from tests.fewstep.sleeping import instead_of_sleep
from tests.service.support import REPOSITORY, Service, clean_environment, eventually

ELSEWHERE = "http://fewstep.example:8000"  # never asked: what is wrong is noticed before


def fewstep(
    *arguments: str | bytes, stdout: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in clean_environment({}).items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "fewstep", *arguments], cwd=REPOSITORY, env={**kept, **variables}, stdout=stdout,
        stderr=subprocess.PIPE, text=True, errors="replace", timeout=60,
    )  # fmt: skip


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What was said on standard error: one line, and no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("fewstep: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_a_terminal_cannot_show_is_replaced(live: Service, client: Client) -> None:
    prompt = f"a 😀 {uuid.uuid4().hex}"
    client.submit(prompt)
    shown = fewstep("jobs", "list", "--url", live.url, PYTHONIOENCODING="latin-1")
    assert shown.returncode == 0 and prompt.replace("😀", "?") in shown.stdout
    listed = fewstep("jobs", "list", "--json", "--url", live.url, PYTHONIOENCODING="latin-1")
    assert prompt in [job["prompt"] for job in json.loads(listed.stdout)["data"]] and listed.stdout.isascii()


@pytest.mark.parametrize(
    "arguments", [["generate", b"a caf\xe9"], ["jobs", "get", b"caf\xe9"], ["models", "load", b"\xe9", "1"]]
)
def test_arguments_that_are_not_text_are_refused(live: Service, arguments: list[str | bytes]) -> None:
    assert "not UTF-8 text" in sentence(fewstep(*arguments, "--url", live.url), 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["jobs", "list"], ["jobs", "list", "--json"], ["--help"]])
def test_output_that_cannot_be_written_is_one_sentence(live: Service, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = fewstep(*arguments, stdout=full.fileno(), FEWSTEP_URL=live.url)
    assert sentence(done, 1) == "fewstep: the output cannot be written: No space left on device.\n"


@pytest.mark.parametrize(
    ("variables", "url", "said"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, ELSEWHERE, "pip install 'httpx[socks]'"),
        ({"HTTP_PROXY": "ftp://name:secret@127.0.0.1:9"}, ELSEWHERE, "The proxy of the environment, ftp://127.0.0.1:9,"),
        ({"SSL_CERT_FILE": "/not/there.pem"}, "https://fewstep.example", "SSL_CERT_FILE (/not/there.pem) cannot be"),
        ({"SSL_CERT_FILE": __file__}, "https://fewstep.example", "SSL_CERT_FILE"),
        ({}, f"{ELSEWHERE}?x=1", "leave out the query and the fragment"),
        ({}, f"{ELSEWHERE}/#here", "leave out the query and the fragment"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_used_is_one_sentence(variables: dict[str, str], url: str, said: str) -> None:
    done = fewstep("jobs", "list", FEWSTEP_URL=url, **variables)
    assert said in sentence(done, 2) and "secret" not in done.stderr
    assert sentence(fewstep("models", "list", FEWSTEP_URL=url, **variables), 2) == done.stderr


@pytest.mark.parametrize(
    ("excepted", "host", "proxied"),
    [
        ("localhost,[::1]", "fewstep.example", True),
        ("localhost,[::1],fd00::/8", "fewstep.example", True),
        (".example", "fewstep.example", False),
        ("fewstep.example:8000", "fewstep.example", False),
        ("fd00::5", "[fd00::5]", False),
        ("*", "fewstep.example", False),
        ("", "127.0.0.1", False),
        ("", "[::1]", False),
        ("", "localhost", False),
    ],
)
def test_exceptions_from_the_proxy(monkeypatch: pytest.MonkeyPatch, excepted: str, host: str, proxied: bool) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", excepted)
    found = connection(f"http://{host}:8000", None, 1.0)
    assert (found.proxy == "http://127.0.0.1:9") is proxied
    with Client(f"http://{host}:8000"):
        pass


def test_a_broken_certificate_variable_is_no_matter_without_https(
    monkeypatch: pytest.MonkeyPatch, live: Service
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/not/there.pem")
    with Client(live.url) as client:
        assert client.models()


@pytest.mark.parametrize("suffix", ["/v1", "/v1/", "/"])
def test_the_address_of_openais_clients_is_understood(live: Service, suffix: str) -> None:
    assert fewstep("jobs", "list", FEWSTEP_URL=live.url + suffix).returncode == 0


def test_both_kinds_of_command_say_the_same_of_the_same_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_sleep(monkeypatch, lambda seconds: None)
    commands = [[name, "list", "--url", "http://127.0.0.1:9"] for name in ("jobs", "models", "dlq")]
    found = [CliRunner().invoke(app, command) for command in commands]
    assert {done.exit_code for done in found} == {9}
    said = {done.stderr for done in found}
    assert said == {"fewstep: The service cannot be reached at http://127.0.0.1:9: [Errno 111] Connection refused.\n"}


def test_an_interrupted_generate_cancels_its_job(live: Service, client: Client, tmp_path: Path) -> None:
    prompt = f"fake:step=2 {uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "generate", prompt, "-o", str(tmp_path / "a.png"), "--url", live.url],
        cwd=REPOSITORY, env=clean_environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    mine = lambda: [job for job in client.jobs(100) if job.prompt == prompt]  # noqa: E731
    eventually(mine, "the job is accepted")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    (job,) = mine()
    assert (process.returncode, stdout) == (130, "")
    assert stderr == f"fewstep: Interrupted; job {job.id} was cancelled.\n"
    assert job.status == "cancelled" or job.cancelling
