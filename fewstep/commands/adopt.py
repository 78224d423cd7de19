"""``fewstep adopt``: what ``python -m export.adopt`` does, with its options."""

from __future__ import annotations

import typer

from fewstep.commands.serve import SETTINGS as SETTINGS


def adopt(context: typer.Context) -> None:
    """Make a student of a published few-step model, to be served as it is (needs the extra export)."""
    from export.adopt import adopt as make

    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(make)
    command(args=context.args, prog_name="fewstep adopt")
