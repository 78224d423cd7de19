"""``fewstep models``: the models of a running service, and the operator's load, promote and unload."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewstep.options import AdminKey, Json, Url, client
from fewstep.output import print_json, table
from fewstep.protocol import quoted

HEAD = ("MODEL", "VERSION", "STATE", "", "WORKERS", "REASON")

app = typer.Typer(no_args_is_help=True, help="List, load, promote and unload the models of a running service.")

Name = Annotated[str, typer.Argument(metavar="ID", help="The model: its folder in FEWSTEP_MODELS.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="The version: its folder in the model's.")]
Wait = Annotated[float, typer.Option("--wait", min=0, max=600, help="Seconds to wait for the workers.")]


@app.command("list")
def list_models(url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """List every version in the service's directory, and its state."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/models")
    print_json(body) if json else typer.echo(table(HEAD, [_row(version) for version in body["data"]]))


@app.command()
def load(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = None, api_key: AdminKey = None, json: Json = False
) -> None:
    """Load and warm up a version on every worker, beside those that are served. Exit code 3: it was refused."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "load"), wait_s=wait), json)


@app.command()
def promote(model: Name, version: Version, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Make a loaded version the latest: the one that requests without a version get."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "promote")), json)


@app.command()
def unload(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = None, api_key: AdminKey = None, json: Json = False
) -> None:
    """Refuse new requests for a version, finish those that were accepted, and unload it."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "unload"), wait_s=wait), json)


def _path(model: str, version: str, action: str) -> str:
    return f"admin/models/{quoted(model)}/{quoted(version)}/{action}"


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(row)
    latest = ", and is its model's latest" if row["latest"] else ""
    typer.echo(f"{row['model']} {row['version']} is {row['state']}{latest}.")


def _row(version: dict[str, Any]) -> list[str]:
    latest = "latest" if version["latest"] else ""
    return [version["model"], version["version"], version["state"], latest, str(version["workers"]), version["reason"]]
