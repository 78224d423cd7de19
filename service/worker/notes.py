"""What is counted with a job's end, and only with it: for the drift tests, for a canary, and of prompts that may train.

finish.lua does the counting under the job's fence; here is decided what there is to count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.quality.drift import CAP, factors, observe, stream_key, threshold
from service.quality.feedback import FeedbackPolicy, entry_of, prompt_digest
from service.queue.job import Job
from service.worker.scoring import Judged
from student.bundle import Student
from student.reference import own_reference
from student.runtimes.sizes import size_name


@dataclass(frozen=True)
class Timing:
    """Of a job's pictures: seconds that its calls took, and the images in the largest of them."""

    call_s: float
    batch: int


def notes_of(
    student: Student, job: Job, judged: Sequence[Judged], timing: Timing, policy: FeedbackPolicy
) -> dict[str, Any]:
    """The notes for a job that is done; see finish.lua."""
    rewards = means(judged)
    if job.pair:  # drawn a second time, and for nobody: no traffic
        return {"half": {"rewards": rewards, "call_s": timing.call_s, "batch": timing.batch}}
    notes: dict[str, Any] = {}
    if rewards:
        notes = {"drift": _drift(student, job, judged, rewards), "seen": _digest(job)}
    if job.may_train and (low := _low(student, job, judged, policy)):
        notes["low"] = low
    return notes


def means(judged: Sequence[Judged]) -> dict[str, float]:
    """A job's score by scorer: the mean of its pictures, where the scorer has scored all of them."""
    names = set.intersection(*(set(one.reward) for one in judged)) if judged else set()
    return {name: sum(one.reward[name] for one in judged) / len(judged) for name in sorted(names)}


def _drift(student: Student, job: Job, judged: Sequence[Judged], rewards: Mapping[str, float]) -> list[dict[str, Any]]:
    size, selected = (job.height, job.width), bool(job.rank_by)
    limit = threshold(len(student.scorers))
    rows: list[dict[str, Any]] = []
    for scorer, mean in rewards.items():
        key = stream_key(job.model, job.version, job.steps, size_name(size), scorer, selected)
        reference = own_reference(student, scorer, job.steps, size)
        seen = observe(reference, [one.reward[scorer] for one in judged]) if reference else None
        row: dict[str, Any] = {"key": key, "score": mean, "low": seen.low if seen else 0.0}
        if reference and seen and not selected:
            row |= {"by": factors(reference, seen), "limit": limit, "cap": CAP * limit}
        rows.append(row)
    return rows


def _digest(job: Job) -> str:
    """Of a prompt as it is drawn by one version: another version, or other steps, is another observation."""
    drawn = f"{job.model}/{job.version}/{job.steps}/{job.height}x{job.width}/{prompt_digest(job.prompt)}"
    return hashlib.sha256(drawn.encode()).hexdigest()[:16]


def _low(student: Student, job: Job, judged: Sequence[Judged], policy: FeedbackPolicy) -> dict[str, Any] | None:
    """The entry of a prompt whose pictures rank low by the scorers that may be trained on.

    A held-out scorer has no say: what it knows must not reach a student.
    """
    trained = {name for name, scorer in student.scorers.items() if scorer.role == "trained"}
    ranks = [min((one.reward_percentile[name] for name in trained & one.reward_percentile.keys()), default=None)
             for one in judged]  # fmt: skip
    known = [rank for rank in ranks if rank is not None]
    if not known or (percentile := sum(known) / len(known)) >= policy.percentile:
        return None
    limits = {"most": policy.most, "most_per_key": policy.most_per_key, "kept_ms": policy.kept_ms}
    return {"digest": prompt_digest(job.prompt), "entry": entry_of(job, percentile), **limits}
