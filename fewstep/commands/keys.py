"""``fewstep keys``: the API keys of a service, in its data directory. A running service notices every change."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke the API keys of a service.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataDir = Annotated[
    Path | None, typer.Option(help="The service's data directory; without it, what FEWSTEP_DATA_DIR says.")
]
SHOWN = ("id", "name", "scopes", "quota", "created", "revoked")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")],
    scope: Annotated[
        list[str], typer.Option("--scope", "-s", help="generate, read, metrics or admin; may be repeated.")
    ] = ["generate", "read"],  # noqa: B006 - typer copies it
    quota: Annotated[float | None, typer.Option(help="Megapixel-steps a minute, instead of FEWSTEP_QUOTA.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it: this once, for it is stored hashed."""
    with _store(data_dir) as store:
        key, text = store.create(name, scope, quota)
    if as_json:
        typer.echo(json.dumps({"key": text, **_described(key)}))
        return
    typer.echo(text)
    typer.echo(f"Keep it: it is shown this once. {key.id} may {', '.join(key.scopes)}.", err=True)


@app.command("list")
def list_keys(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List all keys; their secrets are not known."""
    with _store(data_dir) as store:
        keys = [_described(key) for key in store.keys()]
    if as_json:
        typer.echo(json.dumps({"keys": keys}))
        return
    if not keys:
        typer.echo("There is no key: the service needs none, and serves this machine only.")
        return
    rows = [[_cell(name, key[name]) for name in SHOWN] for key in keys]
    widths = [max(map(len, column)) for column in zip(SHOWN, *rows, strict=True)]
    for row in (list(SHOWN), *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The key's id, as list shows it.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key, at once and for good."""
    with _store(data_dir) as store:
        key = store.revoke(id)
    typer.echo(json.dumps(_described(key)) if as_json else f"{key.id} ({key.name}) is revoked.")


@contextmanager
def _store(data_dir: Path | None) -> Iterator[Any]:
    """The store of keys of the service in this directory; what goes wrong with it is one sentence."""
    from service.errors import StartupError
    from service.keys import KeyStore
    from service.settings import read_settings

    try:
        yield KeyStore(data_dir.expanduser().absolute() if data_dir else read_settings().data_dir)
    except StartupError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(1)


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


if __name__ == "__main__":
    app()
