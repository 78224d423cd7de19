"""``fewstep keys``: the API keys of a service, in its data directory. A running service notices every change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.errors import FewstepError
from fewstep.options import AdminKey, Json, Url, client
from fewstep.output import print_json, table

app = typer.Typer(
    no_args_is_help=True, help="Create, list and revoke the API keys of a service, and see what they were used for."
)

DataDir = Annotated[Path | None, typer.Option(help="The service's data directory; by default FEWSTEP_DATA_DIR.")]
USAGE = ("DAY", "KEY", "JOBS", "IMAGES", "MEGAPIXEL-STEPS")
SHOWN = ("id", "name", "scopes", "quota", "highest_priority", "allow_training", "created", "revoked")
HEAD = ("id", "name", "scopes", "quota", "priority", "trains", "created", "revoked")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what the key is for.")],
    scope: Annotated[
        list[str], typer.Option("--scope", "-s", help="generate, read, metrics or admin; may be repeated.")
    ] = ["generate", "read"],  # noqa: B006 - typer copies it
    quota: Annotated[float | None, typer.Option(help="Megapixel-steps per minute, instead of FEWSTEP_QUOTA.")] = None,
    max_priority: Annotated[
        int | None, typer.Option(help="Highest priority of its requests, -5 to 5; by default 0, for an admin 5.")
    ] = None,
    allow_training: Annotated[
        bool, typer.Option("--allow-training", help="Its prompts may train later students, unless a request opts out.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Create a key and print it. It is shown only once: only its hash is stored."""
    with _store(data_dir) as store:
        key, text = store.create(name, scope, quota, max_priority, allow_training)
    if json:
        return print_json({"key": text, **_described(key)})
    typer.echo(text)
    typer.echo(f"Keep it: it is shown only once. {key.id} has the scopes {', '.join(key.scopes)}.", err=True)


@app.command("list")
def list_keys(data_dir: DataDir = None, json: Json = False) -> None:
    """List all keys, without their secrets."""
    with _store(data_dir) as store:
        keys = [_described(key) for key in store.keys()]
    if json:
        return print_json({"keys": keys})
    rows = [[_cell(name, key[name]) for name in SHOWN] for key in keys]
    typer.echo(table(HEAD, rows) if rows else "There are no keys: the service needs none and serves this machine only.")


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The key's id, as list shows it.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Revoke a key, immediately and permanently."""
    with _store(data_dir) as store:
        key = store.revoke(id)
    print_json(_described(key)) if json else typer.echo(f"{key.id} ({key.name}) is revoked.")


@app.command()
def usage(
    days: Annotated[int, typer.Option(min=1, max=366, help="Number of days, including today (UTC).")] = 30,
    url: Url = None,
    api_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Show each key's usage by day, as counted by a running service."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/usage", days=days)
    if json:
        return print_json(body)
    rows = [(row["day"], row["key"], row["jobs"], row["images"], f"{row['megapixel_steps']:g}") for row in body["data"]]
    typer.echo(table(USAGE, [tuple(map(str, row)) for row in rows]) if rows else "There was no usage in that time.")


@contextmanager
def _store(data_dir: Path | None) -> Iterator[Any]:
    """The key store of the service in this directory."""
    from service.errors import StartupError
    from service.keys import KeyStore
    from service.settings import read_settings

    try:
        yield KeyStore(data_dir.expanduser().absolute() if data_dir else read_settings().data_dir)
    except StartupError as error:
        raise FewstepError(str(error)) from None


def _described(key: Any) -> dict[str, object]:
    return {name: getattr(key, name) for name in SHOWN}


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if name in ("created", "revoked"):
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(float(str(value))))
    return str(value)
