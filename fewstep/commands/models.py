"""``fewstep models``: which students a running service draws with, and the operator's load, promote and unload."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from fewstep.operator import HERE, AdminKey, Json, Url, ask

app = typer.Typer(no_args_is_help=True, help="List, load, promote and unload the students of a running service.")

Name = Annotated[str, typer.Argument(metavar="ID", help="The model: its folder in FEWSTEP_MODELS.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="The version: its folder in the model's.")]
Wait = Annotated[float, typer.Option("--wait", min=0, max=600, help="Seconds to wait for the workers.")]


@app.command("list")
def list_models(url: Url = HERE, api_key: AdminKey = None, json: Json = False) -> None:
    """Every version in the service's directory, and what became of it."""
    body = ask("GET", url, "/admin/models", api_key, json)
    if json:
        return typer.echo(json_module.dumps(body))
    rows = [_row(version) for version in body["data"]]
    typer.echo(_table(("MODEL", "VERSION", "STATE", "", "WORKERS", "REASON"), rows))


@app.command()
def load(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = HERE, api_key: AdminKey = None, json: Json = False
) -> None:
    """Load and warm a version on every worker, beside what is served. Code 3: it was refused, and why."""
    _tell(ask("POST", url, _path(model, version, "load"), api_key, json, wait), json)


@app.command()
def promote(model: Name, version: Version, url: Url = HERE, api_key: AdminKey = None, json: Json = False) -> None:
    """Make a loaded version the latest: the one that requests without a version get."""
    _tell(ask("POST", url, _path(model, version, "promote"), api_key, json), json)


@app.command()
def unload(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = HERE, api_key: AdminKey = None, json: Json = False
) -> None:
    """Take no more requests for a version, draw what was accepted, and drop it."""
    _tell(ask("POST", url, _path(model, version, "unload"), api_key, json, wait), json)


def _path(model: str, version: str, what: str) -> str:
    return f"/admin/models/{quote(model, safe='')}/{quote(version, safe='')}/{what}"


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
