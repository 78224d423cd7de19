"""The command line ``fewstep``; each command has its own file in ``fewstep/commands``."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import UnsupportedOperation
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from fewstep.commands import adopt, bench, dlq, feedback, generate, jobs, keys, models, serve, worker, workers
from fewstep.errors import FewstepError
from fewstep.options import JSON_META
from fewstep.output import print_error

CANNOT_PRINT = 1
INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 success, 1 cannot start or print, 2 wrong usage, 3 refused, 4 key missing or not allowed, "
    "5 not found, 6 busy, 7 timed out, 8 no image, 9 unreachable, 130 interrupted."
)


class Sentences(TyperGroup):
    """A group whose commands may raise a FewstepError, which is printed as one sentence and gives the exit code."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            _print_anything(stream)
        try:
            return super().main(*arguments, **settings)
        except OSError as error:
            _cannot_print(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FewstepError as error:
            print_error(error, bool(ctx.meta.get(JSON_META)))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="fewstep",
    cls=Sentences,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Generate images and videos with few-step models, and serve them.",
    epilog=EPILOG,
)
app.command("serve", **serve.SETTINGS)(serve.serve)
app.command("worker", **worker.SETTINGS)(worker.worker)
app.command("adopt", **adopt.SETTINGS)(adopt.adopt)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(workers.app, name="workers")
app.add_typer(keys.app, name="keys")
app.add_typer(dlq.app, name="dlq")
app.add_typer(feedback.app, name="feedback")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    app(args=arguments, prog_name="fewstep")


def _print_anything(stream: TextIO) -> None:
    """Print characters that the terminal's encoding lacks as question marks."""
    with suppress(AttributeError, ValueError):
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]


def _cannot_print(error: OSError) -> None:
    """Standard output is full or gone. It is closed for good, so that the interpreter does not try again at exit."""
    with suppress(OSError):
        named = f"{error.filename}: " if error.filename else "the output cannot be written: "
        print(f"fewstep: {named}{error.strerror or error}.", file=sys.stderr, flush=True)
    with suppress(UnsupportedOperation, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CANNOT_PRINT)


if __name__ == "__main__":
    main()
