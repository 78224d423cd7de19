"""The HTTP process."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import signal
import socket
import sys
from contextvars import Context
from types import FrameType

import prometheus_client
import uvicorn
from fastapi import FastAPI

from service.exposure import check_exposure
from service.http.app import build_app
from service.http.protocol import bounded_protocol
from service.http.services import Services
from service.keys import KeyStore
from service.settings import Settings

STOP_MARGIN_S = 1  # for responses that are sent at the last moment
KEEP_ALIVE_S = 75  # longer than the idle limit of common load balancers, so that they close first

DESCRIPTORS_WANTED = 65536
DESCRIPTORS_APART = 128  # files, the queue, the result store, threads

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that notifies the application as soon as it must stop, so that /readyz and waiting requests know."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        services: Services | None = getattr(self._app.state, "services", None)
        if services is None or services.stopping.is_set():
            return super().handle_exit(sig, frame)
        services.stopping.set()
        # A signal may arrive while a request is being handled; the line must not carry that request's context.
        Context().run(log.info, "stopping", extra={"drain_s": self._drain_s})
        asyncio.get_running_loop().call_later(self._drain_s, super().handle_exit, sig, frame)


def run_server(settings: Settings, listener: socket.socket) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT.

    Raises:
        StartupError: there is no student to serve, no queue server is set, or a key is needed and there is none.
    """
    settings.required_redis_url  # noqa: B018
    check_exposure(settings, listener.getsockname()[0], KeyStore(settings.data_dir))
    # The _created series make a scrape a third longer, and nothing uses them.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    app = build_app(settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.grace_s) + STOP_MARGIN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        http=bounded_protocol(settings.head_timeout_s),
        ws="none",
        limit_concurrency=raise_descriptor_limit() - DESCRIPTORS_APART,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)  # uvicorn raises the signal again when all is done
    Server(config, app, settings.drain_s).run(sockets=[listener])


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors, as each waiting client needs one; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError) as error:
            log.warning("at most %d clients can wait at once: %s", soft, error)
    return DESCRIPTORS_WANTED if soft == resource.RLIM_INFINITY else soft
