"""What the operator's commands share: one request to an address of /admin, and what becomes of it."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import httpx
import typer

REFUSED, NOT_ALLOWED, NOT_FOUND, BUSY, UNREACHABLE = 3, 4, 5, 6, 9
EXIT_CODES = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND, 503: BUSY}
CONNECT_S = 10.0
MORE_S = 30.0  # the service answers when its own wait is over; then there is something wrong
LOCAL = ("127.0.0.1", "localhost", "::1")
HERE = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="FEWSTEP_URL", help="Address of the service.")]
AdminKey = Annotated[
    str | None, typer.Option("--api-key", envvar="FEWSTEP_API_KEY", help="A key with the scope admin.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too (on standard error).")]


def ask(
    method: str, url: str, path: str, api_key: str | None, as_json: bool, wait_s: float | None = None, **query: Any
) -> dict[str, Any]:
    """The body of a good answer; another one ends the process with one sentence."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    query = query if wait_s is None else {**query, "wait_s": wait_s}
    timeout = httpx.Timeout((wait_s or 0.0) + MORE_S, connect=CONNECT_S)
    try:
        proxies = httpx.URL(url).host not in LOCAL
        with httpx.Client(trust_env=proxies, timeout=timeout, headers=headers) as client:
            answer = client.request(method, f"{url.rstrip('/')}{path}", params=query)
        body = dict(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError):
        raise _failure({"message": f"No service answers at {url}."}, UNREACHABLE, as_json) from None
    if answer.is_success:
        return body
    error = body.get("error") or {"message": f"The service answered {answer.status_code}."}
    raise _failure(error, EXIT_CODES.get(answer.status_code, REFUSED), as_json)


def _failure(error: dict[str, Any], code: int, as_json: bool) -> typer.Exit:
    typer.echo(json_module.dumps({"error": error}) if as_json else f"fewstep: {error['message']}", err=True)
    return typer.Exit(code)
