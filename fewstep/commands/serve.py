"""``fewstep serve``: ``python -m service.run serve`` with its options."""

from __future__ import annotations

from typing import Any

import typer

SETTINGS: dict[str, Any] = {
    "add_help_option": False,  # the service has a help of its own
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def serve(context: typer.Context) -> None:
    """Start a whole service: queue, workers and HTTP process. Its settings are environment variables FEWSTEP_..."""
    run("serve", context.args)


def run(command: str, arguments: list[str]) -> None:
    """Run a command of the service with the remaining arguments."""
    from service.run import app

    app(args=[command, *arguments], prog_name="fewstep")
