"""Draw a batch of jobs: one that makes the batch fail fails alone, one that is dropped is not finished.

Legend: B images, C = 3 colour channels, H x W pixels; of videos, frames F stand before C.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from service.queue.job import Job
from service.worker.batching import Slot, plan
from service.worker.fit import Fit
from student.runtimes.runtime import FloatArray, Preview, Runtime, StepwiseRuntime
from student.runtimes.sizes import own_size

Watching = Callable[[Sequence[Slot], int, Preview], None]
Guard = Callable[[int], AbstractContextManager[None]]

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The images of a runtime call are no longer needed."""


class DeviceLost(Exception):
    """The runtime fails at the warm-up image, which worked before: the device is at fault, not the job."""


@dataclass(frozen=True)
class Failure:
    """Why a job has no images: a code of ``service.errors`` and a sentence for the client."""

    code: str
    message: str


@dataclass(frozen=True)
class Drawn:
    """One call of the runtime: its images and its time; ``splits`` is how often a larger one was halved for it."""

    slots: tuple[Slot, ...]
    images_BCHW: FloatArray
    inference_s: float
    splits: int = 0


@dataclass(frozen=True)
class Executed:
    """What became of a batch: the calls, the failures by the job's number, and the jobs to be handed back undrawn."""

    calls: tuple[Drawn, ...] = ()
    failures: Mapping[int, Failure] = field(default_factory=dict)
    undrawn: frozenset[int] = frozenset()

    @property
    def device_lost(self) -> bool:
        return bool(self.undrawn)


@contextmanager
def unguarded(_images: int) -> Iterator[None]:
    yield


def execute(
    runtime: Runtime,
    jobs: Sequence[Job],
    watching: Watching | None = None,
    guard: Guard = unguarded,
    fit: Fit | None = None,
) -> Executed:
    """Draw jobs that share a batch key. If that fails, each is tried alone: one cannot harm another.

    ``watching(slots, step, preview)`` is called between the steps of each call, where the runtime shows them; it ends
    the call by raising ``Stopped``. ``guard(images)`` is entered around each call. ``fit`` remembers
    from batch to batch how many images fit into one.
    """
    fit = fit or Fit()
    try:
        return Executed(tuple(_draw_all(runtime, jobs, watching, guard, fit)))
    except Exception as error:  # a network may fail in any way; its process goes on
        if len(jobs) > 1:
            log.warning("a batch of %d jobs failed (%s); each is retried alone", len(jobs), type(error).__name__)
        else:
            log.exception("job %s failed", jobs[0].id)
    if len(jobs) > 1:
        return _each_alone(runtime, jobs, watching, guard, fit)
    return _fault_of_job_or_device(runtime, guard)


def drawn_of(executed: Executed, job: int) -> list[tuple[Drawn, int]]:
    """The calls and rows of a job's images, in order."""
    return [(call, row) for call in executed.calls for row, slot in enumerate(call.slots) if slot.job == job]


def _fault_of_job_or_device(runtime: Runtime, guard: Guard) -> Executed:
    """After a job failed alone: if the device still draws the picture of the warm-up, the job was the reason."""
    student = runtime.student
    try:
        with guard(1):
            runtime.draw(["a"], [0], min(student.steps))
    except Exception:
        log.exception("the device fails at the warm-up image, too")
        return Executed(undrawn=frozenset({0}))
    return Executed(failures={0: Failure("generation_failed", "The image could not be generated.")})


def _each_alone(runtime: Runtime, jobs: Sequence[Job], watching: Watching | None, guard: Guard, fit: Fit) -> Executed:
    calls: list[Drawn] = []
    failures: dict[int, Failure] = {}
    for number, job in enumerate(jobs):
        single = execute(runtime, [job], watching and _of_job(watching, number), guard, fit)
        if single.device_lost:
            return Executed(tuple(calls), failures, frozenset(range(number, len(jobs))))
        calls += [replace(call, slots=_numbered(call.slots, number)) for call in single.calls]
        if single.failures:
            failures[number] = single.failures[0]
    return Executed(tuple(calls), failures)


def _of_job(watching: Watching, number: int) -> Watching:
    """For a job that is drawn alone: whoever watches knows it by its number in the whole batch."""

    def watch(slots: Sequence[Slot], step: int, preview: Preview) -> None:
        watching(_numbered(slots, number), step, preview)

    return watch


def _numbered(slots: Sequence[Slot], number: int) -> tuple[Slot, ...]:
    return tuple(replace(slot, job=number) for slot in slots)


def _draw_all(
    runtime: Runtime, jobs: Sequence[Job], watching: Watching | None, guard: Guard, fit: Fit
) -> Iterator[Drawn]:
    for slots in plan(jobs, fit.most(_shape(runtime, jobs[0]), runtime.max_batch)):
        yield from _draw_or_halve(runtime, slots, jobs[0], watching, guard, fit)


def _shape(runtime: Runtime, job: Job) -> Hashable:
    return runtime.student.id, runtime.student.version, job.height, job.width, job.frames


def _draw_or_halve(
    runtime: Runtime, slots: Sequence[Slot], job: Job, watching: Watching | None, guard: Guard, fit: Fit
) -> list[Drawn]:
    """One call; where the memory is too small for it, two of half the size, and so on."""
    try:
        with guard(len(slots)):
            drawn = _draw(runtime, slots, job, watching)
        if drawn:
            fit.drew(_shape(runtime, job), len(slots))
        return [drawn] if drawn else []
    except Exception as error:
        if len(slots) < 2 or not _out_of_memory(error):
            raise
    log.warning("out of memory with %d images in one call; it is split in halves", len(slots))
    fit.ran_out(_shape(runtime, job), len(slots))
    half = len(slots) // 2  # outside of the handler, whose traceback would keep the failed call's arrays alive
    halves = [_draw_or_halve(runtime, part, job, watching, guard, fit) for part in (slots[:half], slots[half:])]
    first = halves[0]
    return [*(replace(call, splits=call.splits + 1) for call in first[:1]), *first[1:], *halves[1]]


def _out_of_memory(error: Exception) -> bool:
    """Whether a runtime says so: torch and Python by the exception's name, ONNX Runtime and TensorRT in words."""
    words = f"{type(error).__name__} {error}".lower()
    return any(sign in words for sign in ("memoryerror", "out of memory", "failed to allocate memory", "bad_alloc"))


def _draw(runtime: Runtime, slots: Sequence[Slot], job: Job, watching: Watching | None) -> Drawn | None:
    """None if the call was ended. ``job`` is any of the batch: they are alike in steps and size."""
    prompts, seeds = [slot.prompt for slot in slots], [slot.seed for slot in slots]
    steps, size, sized = job.steps, (job.height, job.width), dict[str, Any]()
    if size != own_size(runtime.student):
        sized["size"] = size  # a SizedRuntime takes it
    if job.frames and job.frames != runtime.student.image.frames:
        sized["frames"] = job.frames  # a VideoRuntime does
    started = time.perf_counter()
    try:
        if watching and isinstance(runtime, StepwiseRuntime):
            images_BCHW = runtime.draw_watched(prompts, seeds, steps, partial(watching, slots), **sized)
        else:
            images_BCHW = runtime.draw(prompts, seeds, steps, **sized)
    except Stopped:
        return None
    return Drawn(tuple(slots), images_BCHW, time.perf_counter() - started)
