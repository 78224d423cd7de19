"""The HTTP process."""

from __future__ import annotations

import socket
from types import FrameType

import prometheus_client
import uvicorn
from fastapi import FastAPI

from service.access import check_exposure
from service.app import build_app
from service.keys import KeyStore
from service.services import Services
from service.settings import Settings

STOP_TIMEOUT_S = 2
KEEP_ALIVE_S = 75  # longer than the idle limit of common load balancers, so that it is they who close first


class Server(uvicorn.Server):
    """A server that tells the application at once when it is to stop, so that whoever waits gets an answer."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        services: Services | None = getattr(self._app.state, "services", None)
        if services:
            services.stopping.set()
        super().handle_exit(sig, frame)


def run_server(settings: Settings, listener: socket.socket) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT.

    Raises:
        StartupError: there is no student to serve, no server is known, or a key is needed and there is none.
    """
    settings.required_redis_url  # noqa: B018
    check_exposure(settings, listener, KeyStore(settings.data_dir))
    # A third more lines, for a date that nobody asks for.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    app = build_app(settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    Server(config, app).run(sockets=[listener])
