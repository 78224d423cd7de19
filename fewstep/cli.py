"""The command line ``fewstep``: one file for each command in ``fewstep/commands``."""

from __future__ import annotations

import typer

from fewstep.commands import keys, models

app = typer.Typer(name="fewstep", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")


@app.callback()
def about() -> None:
    """Draw pictures with few-step students."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    app(args=arguments, prog_name="fewstep")


if __name__ == "__main__":
    main()
