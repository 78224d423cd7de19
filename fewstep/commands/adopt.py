"""``fewstep adopt``: ``python -m export.adopt`` with its options."""

from __future__ import annotations

import typer

from fewstep.commands.serve import SETTINGS as SETTINGS


def adopt(context: typer.Context) -> None:
    """Make a student from a published few-step model, to serve it as it is (needs the extra export)."""
    from export.adopt import adopt as make

    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(make)
    command(args=context.args, prog_name="fewstep adopt")
