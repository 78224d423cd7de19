"""Which images share a call of the runtime: pure rules. (Which *jobs* share a claim is decided by claim.lua.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.queue.job import Job


@dataclass(frozen=True)
class Slot:
    """Image ``index`` of job number ``job`` of a batch."""

    job: int
    index: int
    prompt: str
    seed: int


def plan(jobs: Sequence[Job], max_batch: int) -> list[list[Slot]]:
    """The images of the jobs in calls of at most ``max_batch``, as few and as even as possible, in order."""
    slots = [Slot(j, k, job.prompt, seed) for j, job in enumerate(jobs) for k, seed in enumerate(job.seeds)]
    num_calls = -(-len(slots) // max_batch)
    bounds = [len(slots) * call // num_calls for call in range(num_calls + 1)] if slots else [0]
    return [slots[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def largest_call(calls: Sequence[Sequence[Slot]], job: int) -> int:
    """The number of images in the largest call that a job was part of."""
    return max(len(call) for call in calls if any(slot.job == job for slot in call))


def preview_steps(steps: int, wanted: int) -> tuple[int, ...]:
    """After which steps (from 0) previews are taken: at most ``wanted``, evenly spaced, never after the last step."""
    chances = steps - 1
    count = min(wanted, chances)
    return tuple((2 * k + 1) * chances // (2 * count) for k in range(count))
