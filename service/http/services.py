"""The dependencies of the routes: built once for each HTTP process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from redis.exceptions import RedisError

from service.http.drift_log import DriftLog
from service.http.links import Links
from service.http.mirroring import Mirror
from service.http.overload import OverloadGuard
from service.http.streams import RENEW_S, Streams
from service.http.tasks import end
from service.models.controller import ModelController, SingleModel
from service.models.folder import Folder
from service.models.registry import ModelRegistry
from service.models.single import queue_name
from service.observe.background import Background
from service.observe.metrics import Metrics
from service.observe.tracer import Tracing
from service.quality.feedback import FeedbackPolicy
from service.queue.connection import connect_async
from service.queue.feedback_log import FeedbackLog
from service.queue.producer import Producer
from service.queue.replies import BLOCK_S, Replies
from service.results.choose import open_store
from service.results.store import ResultStore
from service.settings import Settings

REAP_EVERY_S = 1.0
FIRST_LOOK_S = 2.0  # a server that is away does not keep a process from starting


@dataclass(frozen=True)
class Services:
    """``stopping`` is set when the process has received a signal to stop."""

    settings: Settings
    models: SingleModel | ModelController
    producer: Producer
    replies: Replies
    results: ResultStore
    metrics: Metrics
    background: Background
    stopping: asyncio.Event
    tracing: Tracing
    guard: OverloadGuard
    streams: Streams
    links: Links
    drift: DriftLog
    mirror: Mirror
    feedback: FeedbackLog


async def services_of(request: Request) -> Services:
    """The services of this process, as a dependency of routes."""
    services: Services = request.app.state.services
    return services


WithServices = Annotated[Services, Depends(services_of)]


@asynccontextmanager
async def background(services: Services) -> AsyncIterator[None]:
    """Run the background tasks of an HTTP process for as long as the context lasts."""

    async def reap() -> None:
        await services.producer.reap()
        if fresh := services.background.unreported:
            await services.producer.count_failures(fresh)
            services.background.reported(fresh)

    async def sweep() -> None:
        if not await services.producer.take_turn("sweep", services.settings.sweep_s / 2):
            return
        quota_bytes = services.settings.results_quota_mb * 2**20
        await asyncio.to_thread(services.results.sweep, services.settings.result_ttl_s, quota_bytes)

    forever = services.background.forever
    tasks = [
        asyncio.create_task(forever("replies", services.replies.read, vital=True)),
        asyncio.create_task(forever("models", services.models.poll, vital=True)),
        asyncio.create_task(forever("reaper", reap, REAP_EVERY_S, vital=True)),
        asyncio.create_task(forever("streams", services.streams.renew, RENEW_S)),
    ]
    if services.settings.sweep_s:
        tasks.append(asyncio.create_task(forever("sweeper", sweep, services.settings.sweep_s)))
    try:
        yield
    finally:
        await end(tasks)


@asynccontextmanager
async def open_services(
    settings: Settings, metrics: Metrics, one: SingleModel | None, tracing: Tracing, guard: OverloadGuard
) -> AsyncIterator[Services]:
    """Connect (lazily) and start the background tasks; without ``one``, several students are served."""
    api = uuid.uuid4().hex
    client = connect_async(settings.required_redis_url)
    reader = connect_async(settings.required_redis_url, block_s=BLOCK_S)
    queue = queue_name(settings)
    producer = Producer(
        client,
        queue,
        api,
        ttl_s=settings.result_ttl_s,
        max_pending=settings.max_pending,
        max_attempts=settings.max_attempts,
        priority_images=settings.priority_images,
        quota=max(1, round(settings.quota * 1000)) if settings.quota else 0,  # the least is no 0: that is no limit
        managed=one is None,
        replicas=settings.replicas,
    )
    registry = ModelRegistry(client, queue)
    services = Services(
        settings=settings,
        models=one or ModelController(settings, Folder(settings.required_models), registry, producer),
        producer=producer,
        replies=Replies(reader, producer, queue, api, metrics.record, metrics.scores),
        results=open_store(settings),
        metrics=metrics,
        background=metrics.background,
        stopping=asyncio.Event(),
        tracing=tracing,
        guard=guard,
        streams=Streams(producer, settings.max_streams),
        links=Links(producer, settings.result_ttl_s),
        drift=DriftLog(client, queue),
        mirror=Mirror(producer),
        feedback=FeedbackLog(client, queue, FeedbackPolicy.of(settings)),
    )
    try:
        # A process that took requests before its first look would answer 404 to models that are served.
        with suppress(RedisError, OSError, TimeoutError):
            await asyncio.wait_for(services.models.refresh(), FIRST_LOOK_S)
        async with background(services):
            yield services
    finally:
        await client.aclose()
        await reader.aclose()


async def ending(services: Services) -> None:
    """Returns when the process is stopping and the grace period for running requests is over."""
    await services.stopping.wait()
    await asyncio.sleep(services.settings.drain_s + services.settings.grace_s)
