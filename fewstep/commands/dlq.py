"""``fewstep dlq``: dead letters, the jobs that were given up because every worker that tried them died."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from fewstep.options import AdminKey, Json, Url, client
from fewstep.output import print_json, table
from fewstep.protocol import quoted

app = typer.Typer(no_args_is_help=True, help="List, retry and drop the jobs whose workers died.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The id of the job that was given up.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="The most to list.")]
HEAD = ("ID", "DIED", "WORKERS", "MODEL", "KEY", "PROMPT")


@app.command("list")
def list_dead_jobs(limit: Limit = 100, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """List the dead letters of the last week, newest first."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/dlq", limit=limit)
    if json:
        return print_json(body)
    rows = [_row(job) for job in body["data"]]
    typer.echo(table(HEAD, rows) if rows else "No job was given up.")


@app.command()
def retry(id: JobId, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Try a job once more, alone, as a new job of the same owner."""
    with client(url, api_key) as service:
        body = service.operate("POST", f"admin/dlq/{quoted(id)}/retry")
    print_json(body) if json else typer.echo(f"{id} is retried as {body['retried_as']}.")


@app.command()
def drop(id: JobId, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Remove a job from the list; the job itself stays failed."""
    with client(url, api_key) as service:
        body = service.operate("POST", f"admin/dlq/{quoted(id)}/drop")
    print_json(body) if json else typer.echo(f"{id} was dropped.")


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    model = f"{job['model']}@{job['model_version']}" if job["model"] else "-"
    died = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job["died"]))
    prompt = job["prompt"] or f"{job['prompt_chars']} characters, {job['prompt_sha256']}"
    return job["id"], died, str(job["attempts"]), model, job["key"], prompt
