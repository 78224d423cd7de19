"""Ranks a score among the student's own scores at the same step count and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from student.bundle import RewardReference, Student
from student.runtimes.sizes import Size, own_size, size_name

Scores = Mapping[str, NDArray[np.float32]]
POINTS = (0, 1, 5, *range(10, 100, 10), 25, 75, 95, 99, 100)


def distribution(scores: Sequence[float], prompts: int | None = None) -> RewardReference:
    """Mean, standard deviation and percentiles of two or more standardised scores, which are of ``prompts`` prompts
    (None: each of its own prompt)."""
    values = np.asarray(scores, dtype=np.float64)
    points = {str(point): float(np.percentile(values, point)) for point in sorted(POINTS)}
    count = min(len(values), prompts or len(values))
    return RewardReference(float(values.mean()), float(values.std(ddof=1)), points, count=count)


def at_key(student: Student, steps: int, size: Size) -> str:
    """The key of a distribution in ``RewardReference.at``: "4" for the student's own size, else "4 512x768"."""
    return str(steps) if size == own_size(student) else f"{steps} {size_name(size)}"


def with_distribution(known: RewardReference | None, key: str, found: RewardReference) -> RewardReference:
    """The reference with one more distribution in ``at``; the first also stands for the whole."""
    known = known or replace(found, at={})
    return replace(known, at={**(known.at or {}), key: found})


def reference_at(student: Student, scorer: str, steps: int, size: Size) -> RewardReference | None:
    """The distribution to compare with: for these steps and this size, else for the steps alone, else for all."""
    known = student.reward_reference.get(scorer)
    if known is None:
        return None
    at: Mapping[str, RewardReference] = known.at or {}
    return at.get(at_key(student, steps, size)) or at.get(str(steps)) or known


def own_reference(student: Student, scorer: str, steps: int, size: Size) -> RewardReference | None:
    """The distribution for exactly these steps and this size; None if it was not measured. (A bundle without ``at`` has
    that of its first step count at the student's own size.)"""
    known = student.reward_reference.get(scorer)
    if known is None:
        return None
    if known.at:
        return known.at.get(at_key(student, steps, size))
    return known if steps == student.steps[0] and size == own_size(student) else None


def percentile(reference: RewardReference, score: float) -> float | None:
    """The percentage of the student's own pictures that score lower, from 0 to 100; None without percentiles."""
    if not reference.percentiles:
        return None
    points = sorted((float(point), value) for point, value in reference.percentiles.items())
    shares, values = zip(*points, strict=True)
    return float(np.interp(score, np.maximum.accumulate(values), shares, left=0.0, right=100.0))


def score_at(reference: RewardReference, share: float) -> float | None:
    """The score below which ``share`` per cent of the student's own pictures lie: the inverse of ``percentile``."""
    if not reference.percentiles:
        return None
    points = sorted((float(point), value) for point, value in reference.percentiles.items())
    shares, values = zip(*points, strict=True)
    return float(np.interp(share, shares, np.maximum.accumulate(values)))


@dataclass(frozen=True)
class Verdict:
    """The scores of one picture in a response, by scorer; a scorer that failed on it is missing in both."""

    reward: Mapping[str, float]
    percentile: Mapping[str, float]


def verdicts(student: Student, scores: Scores, steps: int, size: Size, count: int) -> tuple[Verdict, ...]:
    """The verdict on each of ``count`` pictures of one batch, from the result of ``Runtime.score``."""
    references = {name: reference_at(student, name, steps, size) for name in scores}
    return tuple(
        _verdict({name: float(score_B[b]) for name, score_B in scores.items()}, references) for b in range(count)
    )


def failures(scores: Scores) -> dict[str, int]:
    """The number of pictures that each scorer failed on, for scorers that failed."""
    counts = {name: int((~np.isfinite(score_B)).sum()) for name, score_B in scores.items()}
    return {name: count for name, count in counts.items() if count}


def _verdict(scores: Mapping[str, float], references: Mapping[str, RewardReference | None]) -> Verdict:
    reward = {name: score for name, score in scores.items() if np.isfinite(score)}
    ranks = {name: percentile(known, score) for name, score in reward.items() if (known := references[name])}
    return Verdict(reward, {name: round(rank, 1) for name, rank in ranks.items() if rank is not None})
