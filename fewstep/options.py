"""The options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.client import Client
from fewstep.connection import KEY_VARIABLE, URL_VARIABLE

JSON_META = "fewstep.json"


def _wants_json(context: typer.Context, value: bool) -> bool:
    context.meta[JSON_META] = value  # an error must know it, too
    return value


Url = Annotated[
    str | None, typer.Option("--url", help=f"Address of the service. [env var: {URL_VARIABLE}]", show_default=False)
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help=f"Better given as the variable. [env var: {KEY_VARIABLE}]", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too (on standard error).", callback=_wants_json)]


def client(url: str | None, api_key: str | None) -> Client:
    """A client for a command's options."""
    return Client(url, api_key)
