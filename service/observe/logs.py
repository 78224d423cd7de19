"""Log lines: JSON for machines, text for a terminal. None contains a key, a password, or (unless opted in) a prompt."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from service.observe.context import current_request
from service.observe.log_writer import LogWriter
from service.settings import Settings

TEXT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}
SECRETS = (
    (re.compile(r"(fewstep_[0-9a-f]{12}_)[0-9a-f]+"), r"\1***"),
    (re.compile(r"(://)[^/@\s]*@"), r"\1***@"),
    (re.compile(r"(?i)(bearer\s+)(?!fewstep_)\S+"), r"\1***"),
    (re.compile(r"(?i)(password=)[^&\s]*"), r"\1***"),
)
SHORTEST_MASKED_CHARS = 4
HASH_CHARS = 16

_private: ContextVar[tuple[str, ...]] = ContextVar("private", default=())


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Send the lines of every logger to standard error, as ``log_format`` says (auto: text if that is a terminal)."""
    stream = stream or sys.stderr
    chosen = settings.log_format
    if chosen == "auto":
        chosen = "text" if stream.isatty() else "json"
    handler = _handler(stream)
    handler.setFormatter(JsonLines() if chosen == "json" else TextLines(TEXT))
    # At INFO it logs the URLs of webhooks, which may contain secrets.
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def _handler(stream: TextIO) -> logging.Handler:
    try:
        return LogWriter(stream.fileno())
    except (OSError, ValueError):  # text that is kept in memory, or a stream that was closed
        return logging.StreamHandler(stream)


def flush_logs() -> None:
    """Write pending lines before the process exits abruptly; a reader that hangs is not waited for."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def prompt_facts(prompt: str, whole: bool) -> dict[str, Any]:
    """The log fields of a prompt: its length and hash, by which its owner can find it; the text only if opted in."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_CHARS]
    return {"prompt_chars": len(prompt), "prompt_sha256": digest, **({"prompt": prompt} if whole else {})}


@contextmanager
def keeping_private(*prompts: str) -> Iterator[None]:
    """Mask these texts in messages and tracebacks of any origin while the context lasts."""
    long_enough = {text for text in prompts if len(text) >= SHORTEST_MASKED_CHARS}
    token = _private.set(tuple(sorted(long_enough, key=len, reverse=True)))
    try:
        yield
    finally:
        _private.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object a line: ts, level, logger, message, whatever the line is about, and a traceback as ``exc``."""

    def format(self, record: logging.LogRecord) -> str:
        about = {name: value for name, value in record.__dict__.items() if name not in STANDARD}
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": _masked(record.getMessage()),
            **_request(),
            **about,
        }
        if record.exc_info:
            line["exc"] = _masked(self.formatException(record.exc_info))
        return without_secrets(json.dumps(line, ensure_ascii=False, default=str))


class TextLines(logging.Formatter):
    """The same as text, for people."""

    def format(self, record: logging.LogRecord) -> str:
        about = {name: value for name, value in record.__dict__.items() if name not in STANDARD}
        fields = " ".join(f"{name}={value}" for name, value in {**_request(), **about}.items())
        return without_secrets(f"{_masked(super().format(record))}{' | ' if fields else ''}{fields}")


def without_secrets(text: str) -> str:
    """The text without the secrets of API keys and the passwords in URLs."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


def _masked(text: str) -> str:
    for prompt in _private.get():
        text = text.replace(prompt, f"<{len(prompt)} characters>")
    return text


def _request() -> dict[str, str]:
    info = current_request.get()
    if info is None:
        return {}
    fields = {"request_id": info.request_id, "key": info.key, "job_id": info.job_id, "trace_id": info.trace_id}
    return {name: value for name, value in fields.items() if value}
