"""From a job's record to what its client is told: JSON, or the bytes of an image."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

from starlette.responses import Response

from service.answers import GeneratedImage, GenerateResponse, Timings
from service.errors import ServiceError
from service.queue.job import Record
from service.results import ResultMissing
from service.schema import MEDIA_TYPES
from service.services import Services
from student.bundle import Student


async def generated(services: Services, record: Record, base_url: str, total_s: float) -> GenerateResponse:
    """The answer for a job that is done: images in base64, or their addresses below ``base_url``.

    Raises:
        ServiceError: an image was swept away meanwhile.
    """
    job, told = record.job, record.result
    inline = job.response_format != "url"
    return GenerateResponse(
        id=record.id,
        created=int(time.time()),
        model=job.model,
        model_version=job.version,
        runtime=told["runtime"],
        batch_size=told["batch_size"],
        data=[await _image(services, record, k, base_url, inline) for k in range(len(told["images"]))],
        timings=Timings(**told["timings"], total_s=total_s),
    )


async def image_file(services: Services, record: Record, index: int) -> Response:
    """The bytes of image ``index`` of a job that is done; headers tell the rest.

    Raises:
        ServiceError: it was swept away meanwhile.
    """
    image, job = record.result["images"][index], record.job
    data = await read_image(services, image["file"])
    headers = {
        "X-Seed": str(image["seed"]),
        "X-Model-Version": job.version,
        "Content-Disposition": f'inline; filename="{record.id}-{index}.{job.output_format}"',
        "ETag": f'"{image["sha256"]}"',
        "X-Content-Type-Options": "nosniff",
    }
    if (score := main_score(services.student, image["reward"])) is not None:
        headers["X-Reward-Score"] = f"{score:.6f}"
    return Response(data, media_type=MEDIA_TYPES[job.output_format], headers=headers)


async def read_image(services: Services, reference: str) -> bytes:
    """The stored bytes.

    Raises:
        ServiceError: they were swept away.
    """
    try:
        return await asyncio.to_thread(services.results.get, reference)
    except ResultMissing:
        raise ServiceError("The picture was drawn, but its file is gone.", code="result_missing") from None


async def in_base64(services: Services, reference: str) -> str:
    """The stored bytes as text."""
    return base64.b64encode(await read_image(services, reference)).decode("ascii")


def image_url(base_url: str, id: str, index: int) -> str:
    """Where image ``index`` of a job is."""
    return f"{base_url}jobs/{id}/images/{index}"


def main_score(student: Student, reward: dict[str, float]) -> float | None:
    """The score of the scorer that the student was trained on, or of any other, or None without one."""
    trained = [name for name, scorer in student.scorers.items() if scorer.role == "trained" and name in reward]
    names = trained or sorted(reward)
    return reward[names[0]] if names else None


async def _image(services: Services, record: Record, index: int, base_url: str, inline: bool) -> GeneratedImage:
    image = record.result["images"][index]
    told: dict[str, Any] = {name: value for name, value in image.items() if name != "file"}
    if inline:
        return GeneratedImage(b64_json=await in_base64(services, image["file"]), **told)
    return GeneratedImage(url=image_url(base_url, record.id, index), **told)
