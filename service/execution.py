"""Draw and score a batch of jobs; a job that makes the batch fail fails alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.batching import Slot, largest_call, plan
from service.queue.job import Job
from student.runtimes.runtime import FloatArray, Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """The pictures of one job, as arrays, and what they cost; batch mates share the times of their calls."""

    images: tuple[FloatArray, ...]
    rewards: tuple[dict[str, float], ...]
    batch_size: int
    inference_s: float
    score_s: float


@dataclass(frozen=True)
class Failure:
    """Why a job has no pictures: a code of ``service.errors`` and a sentence for the client."""

    code: str
    message: str


@dataclass(frozen=True)
class Call:
    """One call of the runtime, as measured."""

    images: int
    inference_s: float


@dataclass(frozen=True)
class Executed:
    """One outcome for each job, in order, and the calls that led to them."""

    outcomes: tuple[Drawing | Failure, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class _Drawn:
    """The outcome of one call: images, scores and times."""

    slots: list[Slot]
    images_BCHW: FloatArray
    scores: dict[str, FloatArray]
    inference_s: float
    score_s: float


def execute(runtime: Runtime, jobs: Sequence[Job]) -> Executed:
    """Draw and score jobs that share a batch key. If that fails, each is tried alone: one cannot harm another."""
    if not jobs:
        return Executed((), ())
    try:
        drawn = [_draw(runtime, slots, jobs[0].steps) for slots in plan(jobs, runtime.max_batch)]
    except Exception as error:  # a network may fail in any way; its process goes on
        if len(jobs) > 1:
            log.warning("a batch of %d jobs failed (%s); each is tried alone", len(jobs), type(error).__name__)
            return _each_alone(runtime, jobs)
        log.exception("job %s failed", jobs[0].id)
        return Executed((Failure("generation_failed", "The picture could not be drawn."),), ())
    outcomes = tuple(_outcome(drawn, number) for number in range(len(jobs)))
    return Executed(outcomes, tuple(Call(len(call.slots), call.inference_s) for call in drawn))


def _each_alone(runtime: Runtime, jobs: Sequence[Job]) -> Executed:
    single = [execute(runtime, [job]) for job in jobs]
    outcomes = tuple(outcome for executed in single for outcome in executed.outcomes)
    return Executed(outcomes, tuple(call for executed in single for call in executed.calls))


def _draw(runtime: Runtime, slots: list[Slot], steps: int) -> _Drawn:
    prompts = [slot.prompt for slot in slots]
    started = time.perf_counter()
    images_BCHW = runtime.draw(prompts, [slot.seed for slot in slots], steps)
    drawn = time.perf_counter()
    scores = runtime.score(images_BCHW, prompts)
    return _Drawn(slots, images_BCHW, scores, drawn - started, time.perf_counter() - drawn)


def _outcome(drawn: Sequence[_Drawn], job: int) -> Drawing | Failure:
    mine = [(call, row) for call in drawn for row, slot in enumerate(call.slots) if slot.job == job]
    images = tuple(call.images_BCHW[row] for call, row in mine)
    if not all(np.isfinite(image).all() for image in images):
        return Failure("generation_failed", "The picture came out broken (its values are not finite).")
    rewards = tuple(_rewards(call, row) for call, row in mine)
    calls = [call for call in drawn if any(slot.job == job for slot in call.slots)]
    return Drawing(
        images,
        rewards,
        batch_size=largest_call([call.slots for call in drawn], job),
        inference_s=sum(call.inference_s for call in calls),
        score_s=sum(call.score_s for call in calls),
    )


def _rewards(call: _Drawn, row: int) -> dict[str, float]:
    """The scores of one image; a scorer that fails on it is left out, for the picture is good all the same."""
    rewards = {name: float(score[row]) for name, score in call.scores.items()}
    return {name: reward for name, reward in rewards.items() if np.isfinite(reward)}
