"""A job's life as server-sent events.

Every event is a projection of the job's record and has a fixed number, so no state is kept for clients that reconnect:
one that sends the number of its last event (Last-Event-ID) gets the events after it, from the record.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import format_sse_event
from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import DeadlineExceeded, ServiceError, error_detail
from service.http.caller import client_gone
from service.http.presentation import failure, in_base64, job_status, position_of, progress_of
from service.http.schema import MAX_IMAGES, MAX_PREVIEWS
from service.http.services import Services, ending
from service.http.submission import Submission
from service.http.tasks import end
from service.queue.job import Record
from service.queue.states import State

QUEUED, STARTED, PREVIEW, COMPLETED, END, SCORED = 0, 1, 10, 100, 1000, 2000
NOTHING = -1
SCORES = ("seed", "reward", "reward_percentile", "reward_failed", "reward_worst", "worst_frame")
PROGRESS = "progress"
assert MAX_IMAGES <= PREVIEW and PREVIEW * (MAX_PREVIEWS + 1) <= COMPLETED, "no two events have one number"
END_MARGIN_S = 2.0  # the queue ends a job at its deadline, and is polled every second
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)

Leave = Callable[[bool], Awaitable[None]]  # called with True if it is the service that ends


@dataclass(frozen=True)
class Event:
    """One event; ``file`` is the image in the result store that belongs to it."""

    number: int
    name: str
    data: dict[str, Any] = field(default_factory=dict)
    file: str | None = None


def events_of(record: Record) -> list[Event]:
    """All events of a job so far, by number."""
    events = [Event(QUEUED, "queued")]
    if record.claimed_s is not None:
        events.append(Event(STARTED, "started", {"queue_s": record.claimed_s - record.created_s}))
    events += sorted((_preview(name, file) for name, file in record.previews.items()), key=lambda event: event.number)
    if record.state is State.DONE:
        events += [_completed(record, k) for k in range(len(record.result["images"]))]
    if record.terminal:
        events.append(Event(END, "done" if record.state is State.DONE else "error"))
    if record.scoring and record.settled:
        events.append(_scored(record))
    return events


def last_of(record: Record) -> int:
    """The number of the last event that a job will have."""
    return SCORED if record.scoring else END


def _scored(record: Record) -> Event:
    """What has become of scores that come later than the pictures."""
    images = record.result.get("images", ())
    scores = [{"index": k, **{name: image[name] for name in SCORES if name in image}} for k, image in enumerate(images)]
    return Event(SCORED, "scored", {"scoring": record.scoring, "data": scores})


def _preview(name: str, file: str) -> Event:
    number, _, image = name.partition(":")
    data = {"partial_image_index": int(number), "index": int(image)}
    return Event(PREVIEW * (int(number) + 1) + int(image), "image_generation.partial_image", data, file)


def _completed(record: Record, index: int) -> Event:
    image = record.result["images"][index]
    names = (
        "seed", "width", "height", "num_frames", "fps", "sha256", "reward", "reward_percentile", "reward_failed",
        "reward_worst", "worst_frame", "steps", "reported", "below_floor", "candidates",
    )  # fmt: skip
    data = {"index": index, **{name: image[name] for name in names if name in image}}
    return Event(COMPLETED + index, "image_generation.completed", data, image["file"])


class EventStream(Response):
    """The answer that streams a job's events after number ``after``, until its end. It is counted as ``stream``.

    ``leaving`` is called when the client goes away before that, with True if it is the service that does. A
    ``submission`` is made again if the queue's server has forgotten the job.
    """

    media_type = "text/event-stream"
    scores = True  # whether it goes on after the end of a job whose scores come later

    def __init__(
        self, services: Services, id: str, stream: str, base_url: str, *, after: int = NOTHING,
        submission: Submission | None = None, leaving: Leave | None = None,
    ) -> None:  # fmt: skip
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._services = services
        self._id = id
        self._counted_as = stream
        self._base_url = base_url
        self._sent = after
        self._place: object = None
        self._steps_done = 0
        self._submission = submission
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._serve(receive, send)
        finally:
            await self._services.streams.close(self._counted_as)

    async def _serve(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        stream = asyncio.create_task(self._stream(send))
        gone = asyncio.create_task(client_gone(receive))
        stopped = asyncio.create_task(ending(self._services))
        tasks: set[asyncio.Task[Any]] = {stream, gone, stopped}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished, stopping = stream.done(), stopped.done() and not gone.done()
            await end(tasks)
            if self._leaving and not finished:
                await self._leaving(stopping)
        if finished:
            stream.result()
        if not gone.done() or gone.cancelled():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, send: Send) -> None:
        every_s = self._services.settings.event_heartbeat_s
        last = time.monotonic()
        async for text in self._texts():
            if text or time.monotonic() - last >= every_s:
                body = text or format_sse_event(comment="keep-alive")
                await send({"type": "http.response.body", "body": body, "more_body": True})
                last = time.monotonic()

    async def _texts(self) -> AsyncIterator[bytes]:
        """Each event as text, and an empty one after each pause without events."""
        again = self._submission.enqueue if self._submission else None
        within_s = self._submission.options.timeout_s + END_MARGIN_S if self._submission else math.inf
        ended = False
        async for record in self._services.replies.follow(self._id, again, within_s=within_s, scores=self.scores):
            if record is not None:
                ended = record.terminal
                async for text in self._unsent(record):
                    yield text
            yield b""
        if not ended and self._submission:  # the server is down, or has lost the job and refuses it now
            error = DeadlineExceeded(f"Not done within {self._submission.options.timeout_s:g} s.")
            data = {"type": "error", "error": error_detail(error)}
            yield format_sse_event(data_str=json.dumps(data), event="error", id=str(END))

    async def _unsent(self, record: Record) -> AsyncIterator[bytes]:
        """The events of a record that were not sent yet; how far it is has no number, as the place has none."""
        for event in events_of(record):
            if event.number > self._sent or event.number == QUEUED:
                if text := await self._text(event, record):
                    yield text
                self._sent = max(self._sent, event.number)
        if record.state is State.RUNNING and record.steps_done != self._steps_done:
            self._steps_done = record.steps_done
            if text := await self._text(Event(NOTHING, PROGRESS, {"step": record.steps_done}), record):
                yield text

    async def _text(self, event: Event, record: Record) -> bytes | None:
        """What is sent for an event; None: nothing."""
        try:
            data = await self._data(event, record)
        except (ServiceError, RedisError) as error:
            log.warning("event %s of job %s cannot be sent: %s", event.name, record.id, error)
            return None  # a preview of a lost worker, or an image that has expired
        if data is None:
            return None
        number = str(event.number) if event.number > self._sent else None
        return format_sse_event(data_str=json.dumps({"type": event.name, **data}), event=event.name, id=number)

    async def _data(self, event: Event, record: Record) -> dict[str, Any] | None:
        if event.number == QUEUED:
            return await self._queued(record)
        if event.number == END:
            status = (await job_status(self._services, record, self._base_url)).model_dump()
            error = failure(record)
            return {"job": status, **({"error": error_detail(error)} if error else {})}
        if event.name == PROGRESS:
            return {"id": record.id, **event.data, "steps": record.job.steps, "progress": progress_of(record)}
        return {"id": record.id, **event.data, **await self._image(event, record)}

    async def _queued(self, record: Record) -> dict[str, Any] | None:
        """The job's position, the first time and whenever it has changed."""
        place = await position_of(self._services, record)
        if self._sent >= QUEUED and (place is None or place.position == self._place):
            return None
        self._place = place.position if place else None
        return {"id": record.id, "position": self._place, "predicted_wait_s": place.predicted_wait_s if place else None}

    async def _image(self, event: Event, record: Record) -> dict[str, Any]:
        if event.file is None:
            return {}
        job = record.job
        fields = {"created_at": int(record.created_s), "output_format": event.file.rpartition(".")[2]}
        fields["size"] = f"{job.width}x{job.height}"
        if job.response_format == "url" and event.number >= COMPLETED:
            link = await self._services.links.to_image(self._base_url, record, event.data["index"])
            return {**fields, "url": link.url, "expires_at": link.expires}
        return {**fields, "b64_json": await in_base64(self._services, event.file, event.data.get("sha256", ""))}
