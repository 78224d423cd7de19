"""Jobs that were accepted before: finding one, and what may be asked of it."""

from __future__ import annotations

import re

from starlette.responses import Response

from service.errors import Conflict, NotFound, ServiceError
from service.http.presentation import image_file
from service.http.services import Services
from service.queue.job import Record, State

ID = re.compile("[0-9a-f]{32}")


async def find(services: Services, id: str, key: str) -> Record:
    """A job of this caller. A job of somebody else is as unknown as one that never was, or as one that another version
    of the service wrote in a way of its own.

    Raises:
        NotFound, RedisError
    """
    if not ID.fullmatch(id):
        raise _unknown()
    record = (await services.producer.records([id])).get(id)
    if record is None or record.key != key or not record.readable:
        raise _unknown()
    return record


async def owned(services: Services, key: str, limit: int) -> list[Record]:
    """The newest jobs of this caller, newest first.

    Raises:
        RedisError
    """
    records = await services.producer.owned(key, limit)
    return [record for record in records if record.key == key and record.readable]


async def image_of(services: Services, record: Record, index: int) -> Response:
    """The bytes of an image of a job.

    Raises:
        Conflict: the job has not ended yet.
        NotFound: it has no such image, or the image is kept no longer.
    """
    if not record.terminal:
        raise Conflict(f"The job is {record.state}: its images are not there yet.")
    if record.state is not State.DONE:
        raise NotFound(f"The job is {record.state}: it has no images.")
    if index >= len(record.result["images"]):
        raise NotFound(f"The job has {len(record.result['images'])} images, counted from 0.")
    try:
        return await image_file(services, record, index)
    except ServiceError:
        raise NotFound("The image is kept no longer.") from None


def _unknown() -> NotFound:
    return NotFound("There is no such job, or it is kept no longer.")


async def cancelled(services: Services, record: Record) -> Record:
    """The job after it was cancelled: one that waited has ended, one that runs will at its next step boundary, and one
    that had ended before is as it was.

    Raises:
        NotFound, RedisError
    """
    await services.producer.cancel(record.id)
    return await find(services, record.id, record.key)
