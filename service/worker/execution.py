"""Draw and score a batch of jobs; a job that makes the batch fail fails alone, one that is dropped is not finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from service.queue.job import Job
from service.worker.batching import Slot, largest_call, plan
from student.runtimes.runtime import FloatArray, Preview, Runtime, StepwiseRuntime
from student.runtimes.sizes import own_size

Watching = Callable[[Sequence[Slot], int, Preview], None]

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Nobody needs what a call of the runtime draws any more."""


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
    """One call of the runtime, as measured; ``splits`` is how often a larger one had to be halved for it."""

    images: int
    inference_s: float
    splits: int = 0


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
    splits: int = 0


def execute(runtime: Runtime, jobs: Sequence[Job], watching: Watching | None = None) -> Executed:
    """Draw and score jobs that share a batch key. If that fails, each is tried alone: one cannot harm another.

    ``watching(slots, step, preview)`` is called between the steps of each call, where the runtime shows them; it ends
    the call by raising ``Stopped``.
    """
    if not jobs:
        return Executed((), ())
    try:
        planned = plan(jobs, runtime.max_batch)
        calls = [call for slots in planned for call in _draw_or_halve(runtime, slots, jobs[0], watching)]
    except Exception as error:  # a network may fail in any way; its process goes on
        if len(jobs) > 1:
            log.warning("a batch of %d jobs failed (%s); each is tried alone", len(jobs), type(error).__name__)
            return _each_alone(runtime, jobs, watching)
        log.exception("job %s failed", jobs[0].id)
        return Executed((Failure("generation_failed", "The picture could not be drawn."),), ())
    drawn = [call for call in calls if call is not None]
    outcomes = tuple(_outcome(drawn, number, len(job.seeds)) for number, job in enumerate(jobs))
    return Executed(outcomes, tuple(Call(len(call.slots), call.inference_s, call.splits) for call in drawn))


def _each_alone(runtime: Runtime, jobs: Sequence[Job], watching: Watching | None) -> Executed:
    single = [execute(runtime, [job], watching and _of_job(watching, number)) for number, job in enumerate(jobs)]
    outcomes = tuple(outcome for executed in single for outcome in executed.outcomes)
    return Executed(outcomes, tuple(call for executed in single for call in executed.calls))


def _of_job(watching: Watching, number: int) -> Watching:
    """For a job that is drawn alone: whoever watches knows it by its number in the whole batch."""

    def watch(slots: Sequence[Slot], step: int, preview: Preview) -> None:
        watching([replace(slot, job=number) for slot in slots], step, preview)

    return watch


def _draw_or_halve(runtime: Runtime, slots: list[Slot], job: Job, watching: Watching | None) -> list[_Drawn | None]:
    """One call; where the memory is too small for it, two of half the size, and so on."""
    try:
        return [_draw(runtime, slots, job, watching)]
    except Exception as error:
        if len(slots) < 2 or not _out_of_memory(error):
            raise
    log.warning("no memory for %d images in one call; they are drawn in halves", len(slots))
    half = len(slots) // 2  # outside of the handler, whose traceback would keep the failed call's arrays alive
    first, *rest = _draw_or_halve(runtime, slots[:half], job, watching)
    counted = first and replace(first, splits=first.splits + 1)
    return [counted, *rest, *_draw_or_halve(runtime, slots[half:], job, watching)]


def _out_of_memory(error: Exception) -> bool:
    """Whether a runtime says so: torch and Python by the exception's name, ONNX Runtime and TensorRT in words."""
    words = f"{type(error).__name__} {error}".lower()
    return any(sign in words for sign in ("memoryerror", "out of memory", "failed to allocate memory", "bad_alloc"))


def _draw(runtime: Runtime, slots: list[Slot], job: Job, watching: Watching | None) -> _Drawn | None:
    """``job`` is any of the batch: they are alike in steps and size."""
    prompts, seeds = [slot.prompt for slot in slots], [slot.seed for slot in slots]
    steps, size, sized = job.steps, (job.height, job.width), dict[str, Any]()
    if size != own_size(runtime.student):
        sized["size"] = size  # a SizedRuntime takes it
    started = time.perf_counter()
    try:
        if watching and isinstance(runtime, StepwiseRuntime):
            watch = partial(watching, slots)
            images_BCHW = runtime.draw_watched(prompts, seeds, steps, watch, **sized)
        else:
            images_BCHW = runtime.draw(prompts, seeds, steps, **sized)
    except Stopped:
        return None
    drawn = time.perf_counter()
    scores = runtime.score(images_BCHW, prompts)
    return _Drawn(slots, images_BCHW, scores, drawn - started, time.perf_counter() - drawn)


def _outcome(drawn: Sequence[_Drawn], job: int, num_images: int) -> Drawing | Failure:
    mine = [(call, row) for call in drawn for row, slot in enumerate(call.slots) if slot.job == job]
    if len(mine) < num_images:
        return Failure("generation_failed", "The job was dropped.")  # finish answers 'cancelled', 'expired' or 'fenced'
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
