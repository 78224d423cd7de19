"""A job's events as OpenAI's clients read them: previews, images and an error, nothing about the queue."""

from __future__ import annotations

from typing import Any

from service.errors import error_detail
from service.http.events import COMPLETED, END, PREVIEW, Event, EventStream
from service.http.openai.translate import described, usage
from service.http.presentation import failure, in_base64, scoring_of
from service.queue.job import Record

ABOUT = (  # not OpenAI's
    "seed", "reward", "reward_percentile", "reward_failed", "steps", "reported", "below_floor", "candidates",
)  # fmt: skip


class OpenAIStream(EventStream):
    """The stream of ``stream: true``."""

    scores = False  # its clients read to the end of the stream

    async def _data(self, event: Event, record: Record) -> dict[str, Any] | None:
        if event.number == END:
            error = failure(record)
            return {"error": error_detail(error)} if error else None
        if event.number < PREVIEW or event.file is None:  # OpenAI's clients know no other events
            return None
        fields = {"id": record.id, "created_at": int(record.created_s), **described(self._services, record.job)}
        fields["b64_json"] = await in_base64(self._services, event.file, event.data.get("sha256", ""))
        if event.number < COMPLETED:
            return {**fields, "partial_image_index": event.data["partial_image_index"]}
        about = {name: event.data[name] for name in ABOUT if name in event.data}
        if (scoring := scoring_of(record)) is not None:
            about["scoring"] = scoring
        drawn = len(event.data.get("candidates", ())) or 1
        return {**fields, "usage": usage(self._services, record.job, drawn).model_dump(), **about}
