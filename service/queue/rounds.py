"""What is drawn of a job at a time: all of it at once, or round by round until every picture is good enough.

A job without a floor has one round. One with ``min_reward`` draws each image once, then in every further round twice as
many candidates as before of those images that are still below it, up to ``candidates``; then the same at the next step
count of its ``cascade``, with seeds that were not tried yet (more steps on the same noise rarely save a picture). Which
images go on is decided when a round is drawn, and kept with what it has drawn: so a round is drawn again as it was when
its worker is lost.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from service.queue.job import Job

NEXT = "next"  # in the result of a round: which one follows, and of which images


@dataclass(frozen=True)
class Stage:
    """A round of a job, whatever images it is of: candidates from ``first`` to before ``end``, at ``steps``."""

    steps: int
    first: int
    end: int


@dataclass(frozen=True)
class Draw:
    """One picture: candidate ``candidate`` of image ``image`` of its job."""

    image: int
    candidate: int
    seed: int


@dataclass(frozen=True)
class Round:
    """Stage ``number`` of a job, of these images; ``best`` is the result of the rounds before (empty: none)."""

    asked: Job
    number: int
    images: tuple[int, ...]
    best: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def stage(self) -> Stage:
        return stages(self.asked)[self.number]

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        stage = self.stage
        return tuple(
            Draw(image, candidate, seed_of(self.asked, image, candidate))
            for image in self.images
            for candidate in range(stage.first, stage.end)
        )

    @cached_property
    def job(self) -> Job:
        """The job as if it had asked for this round alone: what a worker draws, and what that costs."""
        return replace(
            self.asked,
            steps=self.stage.steps,
            seeds=tuple(draw.seed for draw in self.draws),
            previews=0 if self.number else self.asked.previews,
            candidates=1,
            candidate_seeds=(),
            min_reward=None,
        )

    def following(self, images: Collection[int]) -> Round | None:
        """The round after this one, of these images; None after the last."""
        if not images or self.number + 1 >= len(stages(self.asked)):
            return None
        return Round(self.asked, self.number + 1, tuple(sorted(images)))

    def noted(self) -> dict[str, Any]:
        """What the result before this round says of it."""
        return {NEXT: {"stage": self.number, "images": list(self.images)}}


def first_round(job: Job) -> Round:
    """What is drawn of a job that is new."""
    return Round(job, 0, tuple(range(len(job.seeds))))


def round_of(job: Job, best: str) -> Round:
    """What is to be drawn of a claimed job; ``best`` is the result of its rounds so far, as it was written."""
    try:
        said = json.loads(best) if best else {}
        going, images = said.get(NEXT, {}), said.get("images", [])
        if going and len(images) == len(job.seeds):
            found = Round(job, int(going["stage"]), tuple(map(int, going["images"])), said)
            return found if found.draws else first_round(job)
    except (ValueError, TypeError, AttributeError, LookupError):  # of another release: it is drawn anew
        pass
    return first_round(job)


def seed_of(job: Job, image: int, candidate: int) -> int:
    """The seed of a candidate, as it was written down when the job was accepted."""
    return job.candidate_seeds[image][candidate] if job.candidate_seeds else job.seeds[image]


def stages(job: Job) -> tuple[Stage, ...]:
    """All rounds that a job may have, in their order."""
    waves = list(_waves(job.candidates)) if job.min_reward is not None else [(0, job.candidates)]
    return tuple(
        Stage(steps, level * job.candidates + first, level * job.candidates + end)
        for level, steps in enumerate(job.cascade or (job.steps,))
        for first, end in waves
    )


def _waves(candidates: int) -> Iterator[tuple[int, int]]:
    """1, 1, 2, 4, ... of them: few rounds, and never more than twice what was needed."""
    first, end = 0, 1
    while first < candidates:
        yield first, min(end, candidates)
        first, end = end, 2 * end
