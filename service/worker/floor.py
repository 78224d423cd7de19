"""The floor of a job's pictures, and how far it falls under load: pure rules.

The rule is DiffServe's (Ahmad et al., arXiv 2411.15381), for one set of weights: the highest threshold with which the
workers still keep up with what arrives. First rounds, and working off what waits within as long as arrivals are
remembered, take a share ``utilisation`` of the workers' time. With the floor
at the percentile k, a share p = k / 100 of the pictures goes on to a second round; of what has failed every further
picture fails again with ``FAILS_AGAIN``. So the percentile in effect is the largest k, not above the one that was asked
for, with ``utilisation * (1 + p * further) <= 1``, where ``further`` is the expected cost of all further rounds of a
picture that has failed, as a multiple of the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from service.queue.job import Job
from service.queue.rounds import stages
from student.bundle import RewardReference, Student
from student.reference import percentile, reference_at, score_at

FAILS_AGAIN = 0.5  # measured on the starter's pictures below the 20th percentile: docs/reward-serving.md


@dataclass(frozen=True)
class Load:
    """What the queue has measured: the share of the workers' time that first rounds and what waits take (above 1: more
    than there is), and whether a further round of a job would end after its deadline."""

    utilisation: float
    late: bool


@dataclass(frozen=True)
class Floor:
    """A job's floor: ``score`` and ``percentile`` (None: nothing is known of the student's own) are those in effect."""

    scorer: str
    min_reward: float | str
    asked_score: float
    score: float
    percentile: float | None
    reference: RewardReference | None = None
    utilisation: float | None = None

    @property
    def lowered(self) -> bool:
        return self.score < self.asked_score

    def sends_on(self, score: float) -> bool:
        """Whether a picture of this score (-inf: it has none) is to be drawn once more."""
        known = self.percentile is not None
        full = self.percentile == 0 if known else (self.utilisation or 0.0) >= 1
        return not full and score < self.score

    def under(self, load: Load, job: Job) -> Floor:
        """The floor in effect at this load."""
        if self.percentile is None or self.reference is None:
            return replace(self, utilisation=load.utilisation)
        rank = percentile_under(self.percentile, load.utilisation, further_cost(job))
        score = score_at(self.reference, rank) if rank < self.percentile else None
        return replace(
            self, score=self.score if score is None else score, percentile=rank, utilisation=load.utilisation
        )

    def record(self) -> dict[str, Any]:
        """For the job's record."""
        return {
            "scorer": self.scorer,
            "min_reward": self.min_reward,
            "asked_score": self.asked_score,
            "score": self.score,
            "percentile": self.percentile,
            "lowered": self.lowered,
            "utilization": self.utilisation,
        }


def floor_of(student: Student, job: Job) -> Floor | None:
    """The floor that a job asks for: a percentile is that of the student's own pictures at the job's first step count.

    None without one, and where the student does not say how its own pictures score.
    """
    if job.min_reward is None:
        return None
    reference = reference_at(student, job.rank_by, job.steps, (job.height, job.width))
    if isinstance(job.min_reward, str):
        rank: float | None = float(job.min_reward.removeprefix("p"))
        score = score_at(reference, float(job.min_reward.removeprefix("p"))) if reference else None
    else:
        rank = percentile(reference, job.min_reward) if reference else None
        score = job.min_reward
    if score is None:
        return None
    return Floor(job.rank_by, job.min_reward, score, score, rank, reference)


def percentile_under(asked: float, utilisation: float, further: float) -> float:
    """The percentile in effect: the highest with which the workers keep up."""
    if utilisation <= 0 or further <= 0:
        return asked
    return min(asked, max(0.0, 100 * (1 / utilisation - 1) / further))


def further_cost(job: Job) -> float:
    """The expected cost of all further rounds of an image that has failed, as a multiple of its first round's."""
    first, *rest = stages(job)
    expected, goes_on = 0.0, 1.0
    for stage in rest:
        draws = stage.end - stage.first
        expected += goes_on * draws * stage.steps
        goes_on *= FAILS_AGAIN**draws
    return expected / ((first.end - first.first) * first.steps)
