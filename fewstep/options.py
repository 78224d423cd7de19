"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.client import Client
from fewstep.connection import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE
from fewstep.errors import WrongUse

JSON_META = "fewstep.json"


def _wants_json(context: typer.Context, value: bool) -> bool:
    context.meta[JSON_META] = value  # errors are printed as JSON, too
    return value


Url = Annotated[
    str | None,
    typer.Option("--url", help=f"Address of the service. [env var: {URL_VARIABLE}]", show_default=DEFAULT_URL),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help=f"Prefer the variable. [env var: {KEY_VARIABLE}]", show_default=False),
]
AdminKey = Annotated[
    str | None,
    typer.Option("--api-key", help=f"A key with the scope admin. [env var: {KEY_VARIABLE}]", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; errors too, on standard error.", callback=_wants_json)]


def client(url: str | None, api_key: str | None) -> Client:
    """A client with a command's options."""
    return Client(url, api_key)


def write_file(file: Path, data: bytes) -> Path:
    """Write a result; returns where.

    Raises:
        WrongUse: it cannot be written.
    """
    try:
        file.write_bytes(data)
    except OSError as error:
        raise WrongUse(f"{file} cannot be written: {error.strerror}.") from None
    return file
