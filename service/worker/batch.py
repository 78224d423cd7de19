"""A claimed batch on its way through the worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from service.queue.job import Claimed, Job
from service.queue.rounds import Round
from service.worker.device import Shape
from service.worker.provenance import Provenance
from student.bundle import Student
from student.runtimes.runtime import Runtime


@dataclass(frozen=True)
class Maker:
    """Who draws: the runtime's name, the student, and what its pictures' files say of it."""

    runtime: str
    origin: Provenance
    student: Student


def maker_of(runtime: Runtime) -> Maker:
    student = runtime.student
    return Maker(runtime.name, Provenance(student.id, student.version), student)


@dataclass(frozen=True)
class Batch:
    """Jobs of one batch key, and the runtime that draws them; ``claimed_at`` is of ``time.monotonic``.

    ``rounds`` says of each job what is drawn of it now.
    """

    runtime: Runtime
    claimed: tuple[Claimed, ...]
    rounds: tuple[Round, ...]
    claimed_at: float = field(default_factory=time.monotonic)

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """What is drawn now, as jobs of which it is all."""
        return tuple(drawn.job for drawn in self.rounds)

    @property
    def token(self) -> str:
        return self.claimed[0].token

    @property
    def shape(self) -> Shape:
        student, job = self.runtime.student, self.jobs[0]
        return (student.id, student.version, job.height, job.width, job.frames, job.steps)

    @property
    def images(self) -> int:
        return sum(len(job.seeds) for job in self.jobs)

    @property
    def chooses(self) -> bool:
        """Whether pictures of it are chosen by their scores: these cannot wait."""
        return any(drawn.asked.rank_by for drawn in self.rounds)

    @property
    def suspect(self) -> bool:
        """Whether it was lost with a worker before, and may be the reason."""
        return any(claimed.attempts > 1 for claimed in self.claimed)

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(job.prompt for job in self.jobs)

    @property
    def waiting_since(self) -> float:
        """The moment at which its oldest job was accepted."""
        return self.claimed_at - max(claimed.queue_s for claimed in self.claimed)

    @property
    def maker(self) -> Maker:
        return maker_of(self.runtime)
