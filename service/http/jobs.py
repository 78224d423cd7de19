"""Accepted jobs: finding one, listing them, their images, cancelling."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from service.errors import Conflict, InvalidRequest, NotFound, ServiceError, StoreUnavailable
from service.http.presentation import image_file
from service.http.services import Services
from service.queue.job import Record
from service.queue.states import State
from service.results.store import REFERENCE

ID = re.compile("[0-9a-f]{32}")
CURSOR = re.compile("[0-9]{1,18}")


async def find(services: Services, id: str, key: str | None) -> Record:
    """A job of this caller, or with ``key`` None of any caller.

    Another caller's job is as unknown as one that never existed, or one whose format this version cannot read.

    Raises:
        NotFound, RedisError
    """
    if not ID.fullmatch(id):
        raise _unknown()
    record = (await services.producer.records([id])).get(id)
    if record is None or key not in (None, record.key) or not record.readable:
        raise _unknown()
    return record


@dataclass(frozen=True)
class Page:
    """A page of jobs in order, and the cursor of the next one (empty: there is none)."""

    records: Sequence[Record]
    cursor: str


async def page_of(
    services: Services,
    key: str | None,
    limit: int,
    cursor: str | None,
    wanted: Callable[[Record], bool],
    *,
    oldest_first: bool = False,
) -> Page:
    """The wanted jobs of this caller, or with ``key`` None of all, after ``cursor``; newest first unless it is said
    otherwise.

    Raises:
        InvalidRequest: this is not the cursor of a page.
        RedisError
    """
    after_us = _read_cursor(cursor)
    owners = [key] if key is not None else await services.producer.owners()
    found: list[Record] = []
    for owner in owners:
        found += await services.producer.owned(
            owner, limit + 1, after_us=after_us, oldest_first=oldest_first, wanted=wanted
        )
    found = [record for record in found if key in (None, record.key)]
    found.sort(key=lambda record: record.created_s, reverse=not oldest_first)
    more = len(found) > limit
    shown = found[:limit]
    return Page([record for record in shown if record.readable], cursor_of(shown[-1]) if more else "")


def cursor_of(record: Record) -> str:
    """The cursor of the page that begins after this job."""
    return f"{round(record.created_s * 1e6)}"


def _read_cursor(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    if not CURSOR.fullmatch(cursor):
        raise InvalidRequest("cursor must be the value of next in an earlier page.", "cursor")
    return int(cursor)


async def image_of(services: Services, record: Record, index: int) -> Response:
    """The bytes of an image of a job.

    Raises:
        Conflict: the job has not ended yet.
        NotFound: it has no such image, or the image has expired.
        StoreUnavailable: the store of the images cannot be reached; they may be there.
    """
    if not record.terminal:
        raise Conflict(f"The job is {record.state}: its images are not ready yet.")
    if record.state is not State.DONE:
        raise NotFound(f"The job is {record.state}: it has no images.")
    if index >= len(record.result["images"]):
        raise NotFound(f"The job has {len(record.result['images'])} images, counted from 0.")
    try:
        return await image_file(services, record, index)
    except StoreUnavailable:
        raise
    except ServiceError:
        raise NotFound("The image has expired and was deleted.") from None


def _unknown() -> NotFound:
    return NotFound("There is no such job, or it has expired.")


async def cancelled(services: Services, record: Record) -> Record:
    """The job after it was cancelled: a waiting one has ended, a running one ends at its next step, and one that had
    already ended is unchanged.

    Raises:
        NotFound, RedisError
    """
    await services.producer.cancel(record.id)
    return await find(services, record.id, record.key)


async def erased(services: Services, record: Record) -> None:
    """Delete a job that has ended: its images, then its record.

    Raises:
        Conflict: it has not ended, or its scores are still to come.
        StoreUnavailable: nothing is lost, and the same call deletes them later.
        RedisError
    """
    if not record.settled:
        state = "to be scored" if record.terminal else record.state
        raise _not_ended(state)
    try:
        for token in _claims(record):
            await asyncio.to_thread(services.results.discard, record.id, token)
    except OSError as error:
        raise StoreUnavailable from error
    if (state := await services.producer.erase(record.id)) not in ("erased", "missing"):
        raise _not_ended(state)


def _not_ended(state: str) -> Conflict:
    return Conflict(f"The job is {state}: it can be deleted once it has ended.")


def _claims(record: Record) -> list[str]:
    """The tokens of the claims that its images and previews are from, as their references have them."""
    images = [image.get("file", "") for image in record.result.get("images", ())]
    references = [*images, *record.previews.values()]
    return sorted({reference.split("/")[2] for reference in references if REFERENCE.fullmatch(reference)})
