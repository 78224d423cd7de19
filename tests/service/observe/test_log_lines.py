"""Each line of the log, character by character: programs read them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from service.observe.context import RequestInfo, current_request
from service.observe.logs import configure_logging, flush_logs, keeping_private, prompt_facts, without_secrets
from service.settings import Settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root, chatty = logging.getLogger(), [logging.getLogger(name) for name in ("httpx", "httpcore")]
    handlers, levels = root.handlers[:], [logger.level for logger in (root, *chatty)]
    root.handlers = []
    yield
    root.handlers = handlers
    for logger, level in zip((root, *chatty), levels, strict=True):
        logger.setLevel(level)


def logged(stream: io.StringIO, text: str, *, level: int = logging.INFO, exc: bool = False, **extra: Any) -> str:
    """The line (without its end) of a message of the fixed time 1.5 s."""
    record = logging.LogRecord("service.x", level, "f.py", 1, text, (), None)
    record.created, record.msecs = 1.5, 500.0
    record.__dict__.update(extra)
    if exc:
        try:
            raise ValueError(text)
        except ValueError as error:
            record.exc_info = (ValueError, error, error.__traceback__)
    before = len(stream.getvalue())
    logging.getLogger("service.x").handle(record)
    flush_logs()
    return stream.getvalue()[before:].removesuffix("\n")


def test_a_line_for_programs() -> None:
    configure_logging(Settings(log_format="json"), stream := io.StringIO())
    line = logged(stream, "gr\u00fcn", level=logging.WARNING, batch=7, color_message="x", taskName="y")
    assert line == (
        '{"ts": "1970-01-01T00:00:01.500+00:00", "level": "warning", "logger": "service.x", '
        f'"pid": {os.getpid()}, "message": "gr\u00fcn", "batch": 7}}'
    )
    failed = json.loads(logged(stream, "words", exc=True))
    assert failed["exc"].startswith("Traceback (most recent") and failed["exc"].endswith("ValueError: words")
    assert list(json.loads(logged(stream, "told", what={1}))) == ["ts", "level", "logger", "pid", "message", "what"]


def test_a_line_for_people() -> None:
    configure_logging(Settings(log_format="text"), stream := io.StringIO())
    usual = rf"[-\d]{{10}} [\d:]{{8}},500 {os.getpid()} INFO service\.x: told"
    assert re.fullmatch(usual, logged(stream, "told"))
    token = current_request.set(RequestInfo("r1", job_id="j1"))
    line = logged(stream, "told", batch=7, color_message="x")
    current_request.reset(token)
    assert re.fullmatch(usual + r" \| request_id=r1 key=anonymous job_id=j1 batch=7", line)


@pytest.mark.parametrize(
    ("stream", "form", "json_lines"),
    [
        (Terminal, "auto", False), (io.StringIO, "auto", True), (Terminal, "json", True), (io.StringIO, "text", False),
    ],
)  # fmt: skip
def test_a_terminal_is_for_people_unless_it_is_said(stream: Any, form: Any, json_lines: bool) -> None:
    configure_logging(Settings(log_format=form), made := stream())
    assert logged(made, "told").startswith("{") is json_lines


def test_the_level_is_the_one_that_is_set_and_urls_of_webhooks_are_not_told() -> None:
    for name in ("debug", "info", "warning", "error"):
        configure_logging(Settings(log_level=name), io.StringIO())  # type: ignore[arg-type]
        assert logging.getLogger().level == getattr(logging, name.upper())
        assert [logging.getLogger(chatty).level for chatty in ("httpx", "httpcore")] == [logging.WARNING] * 2
    assert len(logging.getLogger().handlers) == 1, "each line once"


@pytest.mark.parametrize(
    ("private", "text", "shown"),
    [
        (["heart"], "a heart and a heart", "a <5 characters> and a <5 characters>"),
        (["red", "a red heart"], "a red heart, red", "<11 characters>, red"),
        (["heart", "a red heart"], "a red heart, heart", "<11 characters>, <5 characters>"),
        (["abcd"], "abcd", "<4 characters>"),
        (["abc"], "abc", "abc"),
    ],
)
@pytest.mark.parametrize("form", ["json", "text"])
def test_prompts_are_masked_the_longest_first_and_as_long_as_they_are_private(
    private: list[str], text: str, shown: str, form: Any
) -> None:
    configure_logging(Settings(log_format=form), stream := io.StringIO())
    with keeping_private("the prompt of a batch around it"):
        with keeping_private(*private):
            assert shown in logged(stream, text)
        assert "<31 characters>" in logged(stream, "the prompt of a batch around it")
    assert text in logged(stream, text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"fewstep_{'0' * 12}_{'a' * 48}!", f"fewstep_{'0' * 12}_***!"),
        (f"Bearer fewstep_{'0' * 12}_abc", f"Bearer fewstep_{'0' * 12}_***"),
        ("bearer  other rest", "bearer  *** rest"),
        ("redis://user:pw@h:1/0, s3://k@b", "redis://***@h:1/0, s3://***@b"),
        ("https://h/a@b", "https://h/a@b"),
        ("?PASSWORD=pw&db=1 password=x y", "?PASSWORD=***&db=1 password=*** y"),
    ],
)
def test_a_secret_is_three_stars_and_all_else_stays(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_facts_of_a_prompt_that_is_no_text() -> None:
    assert prompt_facts("\ud800", False) == {
        "prompt_chars": 1,
        "prompt_sha256": prompt_facts("\ud800", False)["prompt_sha256"],
    }
    assert len(prompt_facts("\ud800", True)["prompt_sha256"]) == 16
