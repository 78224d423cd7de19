"""Differences between methods with their error, from per-prompt figures of one or several training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; ``seeds`` training runs are behind it."""

    mean: float
    error: float
    seeds: int

    @property
    def holds(self) -> bool:
        """Above zero by more than two standard errors."""
        return self.mean > 2 * self.error

    @property
    def verdict(self) -> str:
        """Whether "above zero" holds by two standard errors."""
        return "holds" if self.holds else "does not hold" if self.mean < -2 * self.error else "is not decided"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def estimate(runs: Sequence[Sequence[float]]) -> Estimate:
    """The mean over prompts and seeds.

    Prompts and training seeds both vary, so both count: the variance of the prompts' means over the number of prompts,
    plus, with two seeds or more, the variance of the seeds' means over the number of seeds.
    """
    table_SP: FloatArray = np.asarray(runs, dtype=float)
    prompts = table_SP.mean(0)
    variance = prompts.var(ddof=1) / len(prompts) if len(prompts) > 1 else 0.0
    if len(table_SP) > 1:
        variance += table_SP.mean(1).var(ddof=1) / len(table_SP)
    return Estimate(float(table_SP.mean()), math.sqrt(variance), len(table_SP))


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """ours - theirs, paired prompt by prompt, and seed by seed where there are as many; else against their mean."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if len(a) != len(b):
        b = np.broadcast_to(b.mean(0), a.shape)
    return estimate(list(a - b))


RESAMPLES = 10_000


def area_under(points: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """The mean height, between ``low`` and ``high``, of the upper left hull of (diversity, quality) points.

    The hull is the best quality that a method reaches at a given diversity or more: a run can always be stopped while
    it is more varied. Below the least varied point the best quality counts; above the most varied one it is 0.

    Raises:
        ValueError: no points, or no width.
    """
    if not points or not low < high:
        raise ValueError(f"{len(points)} points between {low} and {high}: accepted are 1 or more, and low under high")
    at = np.linspace(low, high, 301)
    heights = [max((quality for diversity, quality in points if diversity >= x), default=0.0) for x in at]
    return float(np.mean(heights))


def clustered(table_SP: FloatArray, seed: int = 0) -> tuple[float, float, float]:
    """The mean of differences by training seed and prompt, its error, and the two-sided p-value of "not 0".

    A two-stage bootstrap: seeds are resampled with replacement, and so are the prompts, the same for all seeds.
    """
    gen = np.random.default_rng(seed)
    seeds, prompts = table_SP.shape
    drawn = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows, columns = gen.integers(0, seeds, seeds), gen.integers(0, prompts, prompts)
        drawn[i] = table_SP[rows].mean(0)[columns].mean()
    below = float((drawn <= 0).mean())
    return float(table_SP.mean()), float(drawn.std(ddof=1)), min(1.0, 2 * min(below, 1 - below) + 1 / RESAMPLES)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several claims hold after Holm's correction (Holm 1979), in their own order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    held = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        held[i] = True
    return held
