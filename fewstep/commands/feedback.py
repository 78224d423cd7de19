"""``fewstep feedback``: the prompts that a service kept, with consent, to train later students."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.errors import WrongUse
from fewstep.options import AdminKey, Json, Url, client, write_file
from fewstep.output import print_json

app = typer.Typer(no_args_is_help=True, help="Export or erase the prompts that were kept to train later students.")

Key = Annotated[str | None, typer.Option("--key", help="The id of one API key; by default all keys.")]


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="The file to write; by default standard output.")] = None,
    key: Key = None,
    url: Url = None,
    api_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Write the prompts as JSON lines, the lowest-ranked first, for training.run --set data.prompts=FILE."""
    query: dict[str, Any] = {"key": key} if key else {}
    with client(url, api_key) as service:
        rows = service.operate("GET", "admin/feedback", **query)["data"]
    text = "".join(f"{json_module.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if file is None:
        return typer.echo(text, nl=False)
    write_file(file, text.encode())
    print_json({"file": str(file), "prompts": len(rows)}) if json else typer.echo(f"{file}: {len(rows)} prompts")


@app.command()
def erase(
    key: Key = None,
    everything: Annotated[bool, typer.Option("--all", help="Erase the prompts of all keys.")] = False,
    url: Url = None,
    api_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Erase the prompts that were kept for a key, or for all keys; jobs from before leave none either."""
    if (key is None) is not everything:
        raise WrongUse("Give either --key ID or --all.")
    with client(url, api_key) as service:
        body = service.operate("POST", "admin/feedback/erase", key=key or "all")
    print_json(body) if json else typer.echo(f"{body['prompts']} prompts were erased.")
