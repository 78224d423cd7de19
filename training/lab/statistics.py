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
        """What two standard errors say of "above zero"."""
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
