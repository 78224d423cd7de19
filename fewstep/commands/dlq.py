"""``fewstep dlq``: jobs that were given up because one worker after the other died while it drew them."""

from __future__ import annotations

import json as json_module
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from fewstep.operator import HERE, AdminKey, Json, Url, ask
from fewstep.output import table

app = typer.Typer(no_args_is_help=True, help="List, retry and drop jobs that took their workers with them.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The id of the job that was given up.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")]
HEAD = ("ID", "DIED", "WORKERS", "MODEL", "KEY", "PROMPT")


@app.command("list")
def list_letters(limit: Limit = 100, url: Url = HERE, api_key: AdminKey = None, json: Json = False) -> None:
    """The last week's, newest first."""
    body = ask("GET", url, "/admin/dlq", api_key, json, limit=limit)
    if json:
        return typer.echo(json_module.dumps(body))
    rows = [_row(letter) for letter in body["data"]]
    typer.echo(table(HEAD, rows) if rows else "No job was given up.")


@app.command()
def retry(id: JobId, url: Url = HERE, api_key: AdminKey = None, json: Json = False) -> None:
    """Draw it once more, alone, as a new job of the same owner."""
    body = ask("POST", url, f"/admin/dlq/{quote(id, safe='')}/retry", api_key, json)
    typer.echo(json_module.dumps(body) if json else f"{id} is tried again as {body['retried_as']}.")


@app.command()
def drop(id: JobId, url: Url = HERE, api_key: AdminKey = None, json: Json = False) -> None:
    """Forget it; the job itself stays failed."""
    body = ask("POST", url, f"/admin/dlq/{quote(id, safe='')}/drop", api_key, json)
    typer.echo(json_module.dumps(body) if json else f"{id} is dropped.")


def _row(letter: dict[str, Any]) -> tuple[str, ...]:
    model = f"{letter['model']}@{letter['model_version']}" if letter["model"] else "-"
    died = time.strftime("%Y-%m-%d %H:%M", time.gmtime(letter["died"]))
    prompt = letter["prompt"] or f"{letter['prompt_chars']} characters, {letter['prompt_sha256']}"
    return letter["id"], died, str(letter["attempts"]), model, letter["key"], prompt
