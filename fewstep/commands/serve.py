"""``fewstep serve``: what ``python -m service.run serve`` does, with its options."""

from __future__ import annotations

from typing import Any

import typer

SETTINGS: dict[str, Any] = {
    "add_help_option": False,  # the service has a help of its own
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def serve(context: typer.Context) -> None:
    """Start a whole service: queue, workers and HTTP process. Settings are variables that begin with FEWSTEP_."""
    run("serve", context.args)


def run(command: str, arguments: list[str]) -> None:
    """A command of the service, with the arguments that were left for it."""
    from service.run import app

    app(args=[command, *arguments], prog_name="fewstep")
