"""The HTTP application."""

from __future__ import annotations

import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.http.access import Access
from service.http.description import DescribedApp
from service.http.handlers import add_handlers
from service.http.middleware import BodyLimit, RequestContext
from service.http.overload import OverloadGuard, OverloadMiddleware
from service.http.routes import (
    canaries,
    dlq,
    drift,
    feedback,
    images,
    info,
    jobs,
    models,
    openai,
    pages,
    probes,
    usage,
    videos,
    workers,
)  # fmt: skip
from service.http.services import open_services
from service.http.webhooks import webhooks
from service.http.wire import WireCheck
from service.keys import KeyStore
from service.models.controller import SingleModel
from service.models.folder import Name
from service.models.single import check_models
from service.observe.metrics import Metrics
from service.observe.tracer import Tracing
from service.observe.tracing import open_tracing
from service.settings import Settings

MAX_BODY_BYTES = 262144
EXPOSED_HEADERS = (
    "Location", "Preference-Applied", "Retry-After", "X-Request-ID", "X-Seed", "X-Model-Version", "X-Reward-Score",
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "x-should-retry",
)  # fmt: skip
DESCRIPTION = "Images from a few-step student, each with its reward."


ROUTERS = (
    images.router,
    openai.router,
    videos.router,
    jobs.router,
    models.public,
    models.admin,
    dlq.router,
    drift.router,
    canaries.router,
    feedback.router,
    usage.router,
    workers.router,
    probes.router,
    info.router,
    pages.router,
)


def build_app(settings: Settings, tracing: Tracing | None = None) -> FastAPI:
    """The application with all its routes; it connects when it is started.

    Raises:
        StartupError: there is no student to serve, or the key file cannot be read.
    """
    one = SingleModel(settings) if settings.models is None else None
    check_models(settings)
    tracing = tracing or open_tracing(settings, "api")
    keys = KeyStore(settings.data_dir)
    keys.keys()  # an unreadable file must fail now
    served = one.choice.default() if one else None
    name = served.name if served else Name("several", "")
    guard = OverloadGuard()
    metrics = Metrics(name.id, name.version, {"python": platform.python_version()})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, metrics, one, tracing, guard) as services:
            app.state.services = services
            async with webhooks(services):
                yield
        tracing.close()

    app = DescribedApp(
        title="fewstep",
        description=DESCRIPTION,
        version=name.version or "1",
        lifespan=lifespan,
        servers=[{"url": settings.public_url}] if settings.public_url else None,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(OverloadMiddleware, guard=guard, metrics=metrics)
    app.add_middleware(WireCheck, body_timeout_s=settings.body_timeout_s)
    app.add_middleware(Access, keys=keys, settings=settings)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )  # fmt: skip
    app.add_middleware(RequestContext, metrics=metrics, tracing=tracing)
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
