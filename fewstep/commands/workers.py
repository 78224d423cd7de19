"""``fewstep workers``: list the workers of a running service, and pause, resume or drain one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewstep.options import AdminKey, Json, Url, client
from fewstep.output import print_json, table
from fewstep.protocol import quoted

HEAD = ("ID", "HOST", "STATE", "JOBS", "RUNTIME", "MODELS")
SAYS = {
    "paused": "is paused: it takes no work until it is resumed",
    "ready": "is ready and takes work",
    "loading": "is loading, and then takes work",
    "draining": "is draining: it finishes its jobs and ends",
}

app = typer.Typer(no_args_is_help=True, help="List, pause, resume and drain the workers of a running service.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The worker's id, as list shows it.")]


@app.command("list")
def list_workers(url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """List the live workers and their states."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/workers")
    if json:
        return print_json(body)
    typer.echo(table(HEAD, [_row(worker) for worker in body["data"]]) if body["data"] else "No worker is alive.")


@app.command()
def pause(id: Id, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Pause a worker: it finishes its jobs, claims no more, and stays."""
    _order(id, "pause", url, api_key, json)


@app.command()
def resume(id: Id, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Let a paused worker claim jobs again."""
    _order(id, "resume", url, api_key, json)


@app.command()
def drain(id: Id, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Drain a worker: it finishes its jobs, claims no more, and ends."""
    _order(id, "drain", url, api_key, json)


def _order(id: str, what: str, url: str | None, api_key: str | None, json: bool) -> None:
    with client(url, api_key) as service:
        worker = service.operate("POST", f"admin/workers/{quoted(id)}/{what}")
    print_json(worker) if json else typer.echo(f"{worker['id']} {SAYS.get(worker['state'], worker['state'])}.")


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    models = ", ".join(worker["models"]) or "-"
    return worker["id"], worker["host"], worker["state"], str(worker["jobs"]), worker["runtime"] or "-", models
