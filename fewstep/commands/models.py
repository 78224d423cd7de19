"""``fewstep models``: which students a running service draws with, and the operator's load, promote and unload."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

REFUSED, NOT_ALLOWED, NOT_FOUND, BUSY, UNREACHABLE = 3, 4, 5, 6, 9
EXIT_CODES = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND, 503: BUSY}
CONNECT_S = 10.0
MORE_S = 30.0  # the service answers when its own wait is over; then there is something wrong
LOCAL = ("127.0.0.1", "localhost", "::1")

app = typer.Typer(no_args_is_help=True, help="List, load, promote and unload the students of a running service.")

Name = Annotated[str, typer.Argument(metavar="ID", help="The model: its folder in FEWSTEP_MODELS.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="The version: its folder in the model's.")]
Wait = Annotated[float, typer.Option("--wait", min=0, max=600, help="Seconds to wait for the workers.")]
Url = Annotated[str, typer.Option("--url", envvar="FEWSTEP_URL", help="Address of the service.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="FEWSTEP_API_KEY", help="A key with the scope admin.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too (on standard error).")]
HERE = "http://127.0.0.1:8000"


@app.command("list")
def list_models(url: Url = HERE, api_key: ApiKey = None, json: Json = False) -> None:
    """Every version in the service's directory, and what became of it."""
    body = _call("GET", url, "", api_key, json)
    if json:
        return typer.echo(json_module.dumps(body))
    rows = [_row(version) for version in body["data"]]
    typer.echo(_table(("MODEL", "VERSION", "STATE", "", "WORKERS", "REASON"), rows))


@app.command()
def load(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = HERE, api_key: ApiKey = None, json: Json = False
) -> None:
    """Load and warm a version on every worker, beside what is served. Code 3: it was refused, and why."""
    _tell(_call("POST", url, _path(model, version, "load"), api_key, json, wait), json)


@app.command()
def promote(model: Name, version: Version, url: Url = HERE, api_key: ApiKey = None, json: Json = False) -> None:
    """Make a loaded version the latest: the one that requests without a version get."""
    _tell(_call("POST", url, _path(model, version, "promote"), api_key, json), json)


@app.command()
def unload(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = HERE, api_key: ApiKey = None, json: Json = False
) -> None:
    """Take no more requests for a version, draw what was accepted, and drop it."""
    _tell(_call("POST", url, _path(model, version, "unload"), api_key, json, wait), json)


def _path(model: str, version: str, what: str) -> str:
    return f"/{quote(model, safe='')}/{quote(version, safe='')}/{what}"


def _call(
    method: str, url: str, path: str, api_key: str | None, as_json: bool, wait_s: float | None = None
) -> dict[str, Any]:
    """The body of a good answer; another one ends the process with one sentence."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    query = {} if wait_s is None else {"wait_s": wait_s}
    timeout = httpx.Timeout((wait_s or 0.0) + MORE_S, connect=CONNECT_S)
    try:
        proxies = httpx.URL(url).host not in LOCAL
        with httpx.Client(trust_env=proxies, timeout=timeout, headers=headers) as client:
            answer = client.request(method, f"{url.rstrip('/')}/admin/models{path}", params=query)
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


def _tell(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return typer.echo(json_module.dumps(row))
    latest = ", and is its model's latest" if row["latest"] else ""
    typer.echo(f"{row['model']} {row['version']} is {row['state']}{latest}.")


def _row(version: dict[str, Any]) -> list[str]:
    latest = "latest" if version["latest"] else ""
    return [version["model"], version["version"], version["state"], latest, str(version["workers"]), version["reason"]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
