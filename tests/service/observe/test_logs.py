"""Log lines: what is in them, and above all what is not."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.keys import KeyStore
from service.observe.context import RequestInfo, current_request
from service.observe.logs import configure_logging, keeping_private, prompt_facts, without_secrets
from service.settings import Settings
from tests.service.support import Api, Service, call, eventually, post, running_service

CANARY = "a canary that nobody may read"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield io.StringIO()
    root.handlers, root.level = handlers, level


def lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of an output; what the service prints for people is another stream's."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_line_is_one_object_with_the_request_it_is_about(stream: io.StringIO) -> None:
    configure_logging(Settings(log_format="json"), stream)
    token = current_request.set(RequestInfo("r1", key="k1", job_id="j1", trace_id="t1"))
    logging.getLogger("service.x").warning("told %d\ntwice", 2, extra={"batch": "7"})
    current_request.reset(token)
    logging.getLogger("service.x").error("alone")
    first, second = lines(stream.getvalue())
    assert {name: first[name] for name in ("request_id", "key", "job_id", "trace_id", "batch")} == {
        "request_id": "r1", "key": "k1", "job_id": "j1", "trace_id": "t1", "batch": "7",
    }  # fmt: skip
    assert (first["level"], first["logger"], first["message"]) == ("warning", "service.x", "told 2\ntwice")
    assert first["ts"].endswith("+00:00") and "request_id" not in second


def test_text_says_the_same(stream: io.StringIO) -> None:
    configure_logging(Settings(log_format="text"), stream)
    logging.getLogger("service.x").warning("told", extra={"batch": "7"})
    assert stream.getvalue().endswith("WARNING service.x: told | batch=7\n")


def test_auto_is_json_where_nobody_looks(stream: io.StringIO) -> None:
    configure_logging(Settings(), stream)
    logging.getLogger("service.x").warning("told")
    assert [line["message"] for line in lines(stream.getvalue())] == ["told"]


def test_a_prompt_is_its_length_and_hash_unless_opted_in() -> None:
    digest = hashlib.sha256(CANARY.encode()).hexdigest()
    assert prompt_facts(CANARY, False) == {"prompt_chars": len(CANARY), "prompt_sha256": digest[:16]}
    assert prompt_facts(CANARY, True)["prompt"] == CANARY


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_prompt_in_an_exception_is_masked(stream: io.StringIO, form: Any) -> None:
    configure_logging(Settings(log_format=form), stream)
    with keeping_private(CANARY, "a"):
        try:
            raise ValueError(f"cannot encode {CANARY}")
        except ValueError as error:
            logging.getLogger("service.x").exception("failed: %s", error)
    assert CANARY not in stream.getvalue() and "ValueError" in stream.getvalue()
    assert f"cannot encode <{len(CANARY)} characters>" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"key fewstep_{'a' * 12}_{'b' * 48} came", "b" * 48),
        ("redis://user:hunter2@host:6379/0", "hunter2"),
        ("rediss://:hunter2@host", "hunter2"),
        ("unix:///tmp/s?password=hunter2&db=1", "hunter2"),
        ("Authorization: Bearer hunter2", "hunter2"),
    ],
)
def test_secrets_are_not_shown(text: str, secret: str) -> None:
    assert secret not in without_secrets(text) and without_secrets(text)[:4] == text[:4]


def test_a_request_can_be_followed_through_both_processes_and_its_prompt_cannot_be_read(tmp_path: Path) -> None:
    with running_service(tmp_path / "data") as service:
        key, text = KeyStore(service.data_dir).create("ann")
        headers = {"Authorization": f"Bearer {text}", "X-Request-ID": "follow-me"}
        failing = {**headers, "X-Request-ID": "fails"}
        answer = call("POST", f"{service.url}/generate", headers=headers, json={"prompt": CANARY, "seed": 1}).json()
        call("POST", f"{service.url}/generate", headers=failing, json={"prompt": f"fake:raise {CANARY}"})
        call("GET", f"{service.url}/metrics?key={text}")
        eventually(lambda: "fails" in service.output.read_text())
    logged = service.output.read_text()
    assert CANARY not in logged and text.rpartition("_")[2] not in logged
    report = lines(logged)
    about = [line for line in report if line.get("job_id") == answer["id"] or answer["id"] in line.get("job_ids", [])]
    drawn = [line for line in about if "job_ids" in line]
    assert len(drawn) == 1 and drawn[0]["request_ids"] == ["follow-me"] and drawn[0]["batch"]
    [settled] = [line for line in about if line.get("state")]
    assert (settled["state"], settled["batch"], settled["attempt"]) == ("done", drawn[0]["batch"], 1)
    [asked] = [line for line in about if line.get("verdict")]
    assert (asked["request_id"], asked["key"], asked["verdict"]) == ("follow-me", key.id, "ok")
    assert asked["prompt_sha256"] == hashlib.sha256(CANARY.encode()).hexdigest()[:16]
    [answered] = [line for line in about if line.get("route") == "/generate"]
    assert (answered["status"], answered["request_id"]) == (200, "follow-me")
    [loaded] = [line for line in report if line["message"] == "student loaded"]
    assert loaded["runtime"] == "fake" and loaded["load_s"] >= loaded["warm_up_s"] >= 0


def test_prompts_can_be_opted_in(make_api: Callable[..., Api], capfd: pytest.CaptureFixture[str]) -> None:
    api = make_api(LOG_PROMPTS="true", LOG_FORMAT="json")
    call("POST", f"{api.url}/generate", headers={"Prefer": "respond-async"}, json={"prompt": CANARY})
    report = ""

    def prompts() -> list[str]:
        nonlocal report
        report += capfd.readouterr().err
        return [line["prompt"] for line in lines(report[: report.rfind("\n") + 1]) if "prompt" in line]

    assert eventually(prompts, "the line is written") == [CANARY]


def test_probes_are_not_worth_a_line(live: Service) -> None:
    call("GET", f"{live.url}/healthz", headers={"X-Request-ID": "probing"})
    post(live.url, prompt="p")
    assert "probing" not in live.output.read_text()
