"""``fewstep worker``: ``python -m service.run worker`` with its options."""

from __future__ import annotations

import typer

from fewstep.commands.serve import SETTINGS as SETTINGS
from fewstep.commands.serve import run


def worker(context: typer.Context) -> None:
    """Start one worker for the queue at FEWSTEP_REDIS_URL."""
    run("worker", context.args)
