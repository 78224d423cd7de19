"""A bounded closed-loop load, and what is to be learnt from it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from pydantic import BaseModel

from fewstep.answers import Answer
from fewstep.async_client import AsyncClient
from fewstep.errors import ApiError, FewstepError
from fewstep.request import Options

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One request: how long its answer took, and the answer or the error."""

    seconds: float
    answer: Answer | FewstepError


class Latency(BaseModel):
    """Of the requests that were answered with images, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float


class Report(BaseModel):
    """``batch_sizes`` counts the images by the size of the largest call of the runtime that they rode in; ``errors``
    the requests without an image by the error's code. ``stages`` are mean seconds."""

    requests: int
    concurrency: int
    wall_s: float
    images: int
    images_per_s: float
    requests_per_s: float
    latency: Latency | None
    stages: dict[str, float]
    batch_sizes: dict[int, int]
    errors: dict[str, int]


async def run(
    client: AsyncClient, prompts: Sequence[str], options: Options, *, requests: int, concurrency: int
) -> Report:
    """Send so many requests, ``concurrency`` at a time: each is sent when one before it was answered.

    A request that fails is counted and not repeated, so give a client without retries.
    """
    waiting = islice(cycle(prompts), requests)
    samples: list[Sample] = []
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, requests)):
            group.create_task(_user(client, waiting, options, samples))
    return report(samples, concurrency, time.perf_counter() - started)


async def _user(client: AsyncClient, prompts: Iterator[str], options: Options, samples: list[Sample]) -> None:
    for prompt in prompts:
        started = time.perf_counter()
        answer: Answer | FewstepError
        try:
            answer = await client.generate(prompt, **options)
        except FewstepError as error:
            answer = error
        samples.append(Sample(time.perf_counter() - started, answer))


def report(samples: Sequence[Sample], concurrency: int, wall_s: float) -> Report:
    """What so many requests in ``wall_s`` seconds say."""
    drawn = [(sample.seconds, sample.answer) for sample in samples if isinstance(sample.answer, Answer)]
    failed = [sample.answer for sample in samples if isinstance(sample.answer, FewstepError)]
    images = sum(len(answer.data) for _, answer in drawn)
    sizes: Counter[int] = Counter()
    for _, answer in drawn:
        sizes[answer.batch_size] += len(answer.data)
    return Report(
        requests=len(samples),
        concurrency=concurrency,
        wall_s=wall_s,
        images=images,
        images_per_s=images / wall_s,
        requests_per_s=len(drawn) / wall_s,
        latency=_latency([seconds for seconds, _ in drawn]) if drawn else None,
        stages=_stages([answer for _, answer in drawn]),
        batch_sizes=dict(sorted(sizes.items())),
        errors=dict(Counter(map(_code, failed))),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of all are not above (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def _latency(seconds: Sequence[float]) -> Latency:
    ranks = {f"p{percent}_s": percentile(seconds, percent) for percent in PERCENTILES}
    return Latency(mean_s=sum(seconds) / len(seconds), max_s=max(seconds), **ranks)


def _stages(answers: Sequence[Answer]) -> dict[str, float]:
    """The mean of each timing that every answer has."""
    told = [answer.timings.model_dump() for answer in answers]
    names = [name for name in told[0] if all(isinstance(one.get(name), float) for one in told)] if told else []
    return {name: sum(one[name] for one in told) / len(told) for name in names}


def _code(error: FewstepError) -> str:
    return error.code or str(error.status) if isinstance(error, ApiError) else type(error).__name__
