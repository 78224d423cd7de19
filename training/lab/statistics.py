"""The outcome's arithmetic: the area under a curve of quality against diversity, clustered errors, and Holm's p-values.

Legend: K points of a curve, S training seeds, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ANGLES = 20_001  # of the integral for Student's t


def area(diversity_K: FloatArray, quality_K: FloatArray, low: float, high: float) -> FloatArray:
    """The mean height, from ``low`` to ``high``, of the upper envelope of points; axes before the last are kept.

    The height at a diversity x is the best quality of all points that are at least as varied, and 0 where there is
    none: a run can be stopped while it is more varied, but not given variety that it has lost. The envelope is a step
    function, so its area is a sum.

    Raises:
        ValueError: no points, or no width.
    """
    if not diversity_K.shape[-1] or not low < high:
        raise ValueError(
            f"{diversity_K.shape[-1]} points between {low} and {high}: accepted are 1 or more, and low below high"
        )
    order_K = np.argsort(-diversity_K, axis=-1)
    reached_K = np.clip(np.take_along_axis(diversity_K, order_K, -1), low, high)
    height_K = np.maximum.accumulate(np.take_along_axis(quality_K, order_K, -1), -1)
    end = np.full((*reached_K.shape[:-1], 1), low)
    width_K = reached_K - np.concatenate([reached_K[..., 1:], end], -1)
    total: FloatArray = (height_K * width_K).sum(-1) / (high - low)
    return total


def envelope(diversity_K: FloatArray, quality_K: FloatArray, at: FloatArray) -> FloatArray:
    """The height of that envelope at each diversity of ``at``."""
    return np.array([max(quality_K[diversity_K >= x], default=0.0) for x in at])


@dataclass(frozen=True)
class Estimate:
    """A mean over training seeds, its standard error, and the degrees of freedom of that error.

    With one seed the error counts the prompts alone, and nothing is tested.
    """

    mean: float
    error: float
    seeds: int
    freedom: float

    @property
    def p_value(self) -> float:
        """Two-sided, of a mean of 0; 1 with one seed."""
        if self.seeds < 2 or self.mean == 0:
            return 1.0
        if self.error == 0:
            return 0.0
        return min(1.0, 2 * student_tail(abs(self.mean) / self.error, self.freedom))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def estimate(measured_S: FloatArray, resampled_BS: FloatArray, prompts: int, seed: int = 0) -> Estimate:
    """The mean of ``measured_S`` with an error that counts training seeds and prompts.

    ``resampled_BS[b]`` is the same measure on the b-th resample of the prompts, which is the same for all seeds; the
    seeds are then resampled within it. Deviations of the seeds are widened by sqrt(S / (S - 1)), since resampled ones
    are that much too close together. Degrees of freedom after Satterthwaite (1946).
    """
    count = len(measured_S)
    centre_B1 = resampled_BS.mean(1, keepdims=True)
    rows_BS = np.random.default_rng(seed).integers(0, count, resampled_BS.shape)
    widening = math.sqrt(count / (count - 1)) if count > 1 else 0.0
    deviations_BS = widening * np.take_along_axis(resampled_BS - centre_B1, rows_BS, 1)
    variance = float((centre_B1[:, 0] + deviations_BS.mean(1)).var(ddof=1))
    of_seeds = float(measured_S.var(ddof=1)) / count if count > 1 else 0.0
    of_prompts = max(variance - of_seeds, 0.0)
    spread = (of_seeds**2 / (count - 1) if count > 1 else 0.0) + of_prompts**2 / max(prompts - 1, 1)
    freedom = max((of_seeds + of_prompts) ** 2 / spread, 1.0) if spread else 1.0
    return Estimate(float(measured_S.mean()), math.sqrt(variance), count, freedom)


def resampled_counts(prompts: int, resamples: int, seed: int = 0) -> FloatArray:
    """How often each prompt comes up in each resample of all of them: (B, P)."""
    even = np.full(prompts, 1 / prompts)
    return np.random.default_rng(seed).multinomial(prompts, even, resamples).astype(float)


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t for t of 0 or more: with T = sqrt(freedom) tan(u) the density is that of cos^(freedom-1).

    Integrated by Simpson's rule.
    """
    angle = math.atan(t / math.sqrt(freedom))
    return 0.5 * _cosines(angle, freedom) / _cosines(0.0, freedom)


def _cosines(low: float, freedom: float) -> float:
    """The integral of cos^(freedom - 1) from ``low`` to pi / 2."""
    u = np.linspace(low, math.pi / 2, ANGLES)
    height = np.maximum(np.cos(u), 0.0) ** (freedom - 1)
    weight = np.ones(ANGLES)
    weight[1:-1:2], weight[2:-1:2] = 4, 2
    return float((height * weight).sum() * (u[1] - u[0]) / 3)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each claim's p-value after Holm's correction (1979), in their own order: to be compared with the level itself."""
    count, highest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
