"""The service's command line: ``python -m service.run`` starts everything; its parts can be started alone."""

from __future__ import annotations

import json
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from service.errors import StartupError
from service.observe.logs import configure_logging
from service.settings import Settings, read_settings

REFUSED = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Serve pictures of a few-step student.")


Insecure = Annotated[bool, typer.Option("--insecure", help="Serve other machines though there is no API key.")]
CheckConfig = Annotated[
    bool, typer.Option("--check-config", help="Print the effective configuration and whether it could serve; end.")
]


@app.callback(invoke_without_command=True)
def default(context: typer.Context, insecure: Insecure = False, check_config: CheckConfig = False) -> None:
    """Without a command: serve."""
    if context.invoked_subcommand is None:
        serve(insecure, check_config)


@app.command()
def serve(insecure: Insecure = False, check_config: CheckConfig = False) -> None:
    """Start a server for the queue (unless FEWSTEP_REDIS_URL names one), the workers and the HTTP process."""

    def run(settings: Settings) -> None:
        from service.supervise.supervisor import Supervisor

        Supervisor(settings).run()

    def check(settings: Settings) -> None:
        from service.configuration import check_configuration

        print(json.dumps(check_configuration(settings), indent=2))

    _with_settings(check if check_config else run, insecure)


@app.command()
def api(
    listener: Annotated[int | None, typer.Option(help="A listening socket that was inherited.")] = None,
    insecure: Insecure = False,
) -> None:
    """Start an HTTP process alone."""

    def run(settings: Settings) -> None:
        from service.http.server import run_server
        from service.listener import listen

        found = socket.socket(fileno=listener) if listener is not None else listen(settings.host, settings.port)
        run_server(settings, found)

    _with_settings(run, insecure)


@app.command()
def worker(name: Annotated[str | None, typer.Option(help="The worker's name; it must be unique.")] = None) -> None:
    """Start a worker alone."""

    def run(settings: Settings) -> None:
        from service.worker.worker import run_worker

        run_worker(settings, name or uuid.uuid4().hex)

    _with_settings(run)


@app.command()
def probe() -> None:
    """End with code 0 if a worker of this host has given a sign of life lately, else 1: a container's healthcheck."""

    def run(settings: Settings) -> None:
        from service.supervise.probe import find_worker

        find_worker(settings, socket.gethostname())

    _with_settings(run)


@app.command()
def init(
    secrets: Annotated[Path, typer.Argument(help="Directory for passwords and tokens.")],
    queue_host: Annotated[str, typer.Option(help="Host of the queue's server.")] = "valkey",
) -> None:
    """Make the keys and passwords of a stack of containers, on its first start, and print once what a person needs."""

    def run(settings: Settings) -> None:
        from service.supervise.first_start import prepare

        made = prepare(settings.data_dir, secrets, queue_host)
        if made.api_key:
            print(f"API key (shown this once; fewstep keys create makes others): {made.api_key}", flush=True)
        if made.grafana_password:
            print(f"Grafana: user admin, password {made.grafana_password}", flush=True)

    _with_settings(run)


def _with_settings(run: Callable[[Settings], None], insecure: bool = False) -> None:
    try:
        settings = read_settings()
        settings = settings.model_copy(update={"insecure": settings.insecure or insecure})
        configure_logging(settings)
        run(settings)
    except StartupError as error:
        print(f"fewstep: {error}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)


if __name__ == "__main__":
    app()
