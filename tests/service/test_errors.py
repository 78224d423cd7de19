"""The table of error codes has every code that the service can answer with, and no other; what each error says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from service.errors import (
    CODES,
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    QuotaExceeded,
    ServiceError,
    StoreUnavailable,
    TooManyStreams,
    Unauthorized,
    Unavailable,
    error_body,
    error_detail,
)
from tests.documents.blocks import ROOT

SERVICE = ROOT / "service"


def used(tree: ast.AST) -> Iterator[str]:
    """The codes in a module: ``code="…"`` of a call, ``code = "…"`` of a class or module, and ``Failure("…", …)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            yield from _text(node.value)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "").lower() == "code" for t in node.targets):
            yield from _text(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Failure":
            yield from _text(node.args[0])


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_the_codes_of_a_module_are_found() -> None:
    text = "CODE = 'a'\nclass E:\n    code = 'b'\nf('x', code='c')\nFailure('d', 'm')\nother = 'e'\ng(code=CODE)\n"
    assert set(used(ast.parse(text))) == {"a", "b", "c", "d"}


def test_every_code_is_in_the_table_and_every_one_of_the_table_is_used() -> None:
    found = {code for path in SERVICE.rglob("*.py") for code in used(ast.parse(path.read_text("utf-8")))}
    for path in SERVICE.rglob("*.lua"):
        found |= set(re.findall(r"\bcode = '(\w+)'", path.read_text("utf-8")))
    assert found == set(CODES)


def test_every_code_has_an_error_status_and_says_what_it_means() -> None:
    for code, (status, meaning) in CODES.items():
        assert 400 <= status <= 599, code
        assert len(meaning) > 10 and not meaning.endswith(".") and not set("|\n") & set(meaning), code


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (QueueFull(), {"Retry-After": "1"}),
        (QueueFull(retry_after_s=7.2), {"Retry-After": "8"}),
        (QueueFull(retry_after_s=0.0), {"Retry-After": "1"}),
        (Unavailable(headers={"Location": "/jobs/x"}), {"Location": "/jobs/x", "Retry-After": "1"}),
        (StoreUnavailable(), {"Retry-After": "1"}),
        (QuotaExceeded(retry_after_s=3.0), {"Retry-After": "3"}),
        (QuotaExceeded(retry_after_s=0.0), {"Retry-After": "1"}),
        (QuotaExceeded(), {}),
        (TooManyStreams(), {}),
        (DeadlineExceeded(), {"x-should-retry": "false"}),
        (DeadlineExceeded(retry_after_s=2.0), {"Retry-After": "2"}),
        (DeadlineExceeded(retry_after_s=0.0), {"Retry-After": "1"}),
        (Cancelled(), {"x-should-retry": "false"}),
        (GenerationFailed(), {"x-should-retry": "false"}),
        (GenerationFailed(code="worker_lost"), {"x-should-retry": "false"}),
        (GenerationFailed(code="storage_failed"), {}),
        (ServiceError(), {}),
        (InvalidRequest("m", "p"), {}),
        (Unauthorized(headers={"WWW-Authenticate": "Bearer"}), {"WWW-Authenticate": "Bearer"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_says_when_another_try_makes_sense(error: ServiceError, headers: dict[str, str]) -> None:
    """After what was measured, in whole seconds and at least one; not at all where it would only use the device."""
    assert error.headers == headers


def test_an_error_has_openais_form_and_its_kind_follows_from_the_status() -> None:
    kinds = {}
    for code, (status, _) in CODES.items():
        detail = error_detail(ServiceError("m", "p", code=code))
        assert detail == {"message": "m", "type": detail["type"], "param": "p", "code": code}
        kinds[status] = detail["type"]
    assert {status for status, kind in kinds.items() if kind == "rate_limit_error"} == {429}
    assert {status for status, kind in kinds.items() if kind == "server_error"} == {500, 503, 504}
    assert error_body(QueueFull(), "r") == {
        "error": {
            "message": "The queue is full: too many jobs are waiting.", "type": "server_error", "param": None,
            "code": "queue_full",
        },
        "request_id": "r",
    }  # fmt: skip


def test_each_error_has_its_code() -> None:
    kinds: list[type[ServiceError]] = [ServiceError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.__name__: kind.code for kind in kinds} == {
        "ServiceError": "internal_error", "InvalidRequest": "invalid_request", "Unauthorized": "invalid_api_key",
        "Forbidden": "insufficient_scope", "NotFound": "not_found", "ModelGone": "model_not_found",
        "ModelRefused": "model_refused", "MethodNotAllowed": "method_not_allowed", "Conflict": "conflict",
        "RequestTimeout": "request_timeout", "UnsupportedMediaType": "unsupported_media_type",
        "TooLarge": "too_large", "QuotaExceeded": "quota_exceeded", "TooManyStreams": "too_many_streams",
        "QueueFull": "queue_full", "Unavailable": "unavailable", "StoreUnavailable": "unavailable",
        "DeadlineExceeded": "deadline_exceeded", "Cancelled": "cancelled", "GenerationFailed": "generation_failed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (GenerationFailed("m", code="of_a_later_release"), 500, "server_error", {"x-should-retry": "false"}),
        (Unavailable("m", code="of_a_later_release"), 503, "server_error", {"Retry-After": "1"}),
        (ServiceError("m", code="of_a_later_release"), 500, "server_error", {}),
        (QuotaExceeded("m", code="of_a_later_release"), 429, "rate_limit_error", {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_code_that_only_a_later_release_knows_is_passed_on_in_the_answer_of_its_kind(
    error: ServiceError, status: int, kind: str, headers: dict[str, str]
) -> None:
    assert (error.status, error.headers) == (status, headers)
    assert error_detail(error) == {"message": "m", "type": kind, "param": None, "code": "of_a_later_release"}
