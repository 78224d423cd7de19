"""What choosing among several pictures of one prompt gains, from how their scores vary within the prompt.

Legend: P prompts, S pictures (seeds) of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from student.bundle import Student, WithinPrompt
from student.reference import at_key
from student.runtimes.sizes import Size

Array = NDArray[np.float64]
DIGITS = 4  # far below what any of these figures is known to
MOST = 16  # candidates of which the gain is kept


def measure(scores: Mapping[str, Sequence[Sequence[float]]]) -> WithinPrompt:
    """Spread, correlation and gain of standardised scores_PS by scorer; prompts with a score that is NaN are left out.

    Raises:
        ValueError: fewer than two prompts, or fewer than two pictures of each.
    """
    arrays = {name: np.asarray(rows, np.float64) for name, rows in scores.items()}
    whole_P = np.logical_and.reduce([np.isfinite(rows_PS).all(axis=1) for rows_PS in arrays.values()])
    kept = {name: rows_PS[whole_P] for name, rows_PS in arrays.items()}
    prompts, seeds = next(iter(kept.values())).shape
    if prompts < 2 or seeds < 2:
        raise ValueError(f"{prompts} prompts with {seeds} pictures each: accepted are two or more of both")
    apart = {name: rows_PS - rows_PS.mean(axis=1, keepdims=True) for name, rows_PS in kept.items()}
    spread = {name: _rounded(((rows_PS**2).sum() / (prompts * (seeds - 1))) ** 0.5) for name, rows_PS in apart.items()}
    correlation = {f"{a} {b}": _rounded(_correlation(apart[a], apart[b])) for a, b in combinations(sorted(apart), 2)}
    gain = {
        name: [_rounded(best_of(rows_PS, count).mean()) for count in range(1, min(seeds, MOST) + 1)]
        for name, rows_PS in apart.items()
    }
    return WithinPrompt(prompts, seeds, spread, correlation, gain)


def best_of(scores_PS: Array, count: int) -> Array:
    """For each prompt, the highest score among ``count`` of its S pictures, averaged over all choices of ``count``."""
    return chosen(scores_PS, scores_PS, count)


def chosen(scores_PS: Array, values_PS: Array, count: int) -> Array:
    """The same for another value of the picture whose score is the highest.

    The k-th smallest of S is the highest in C(k - 1, count - 1) of C(S, count) choices.
    """
    seeds = scores_PS.shape[1]
    weights_S = [math.comb(k - 1, count - 1) / math.comb(seeds, count) for k in range(1, seeds + 1)]
    sorted_PS = np.take_along_axis(values_PS, np.argsort(scores_PS, axis=1, kind="stable"), axis=1)
    chosen_P: Array = sorted_PS @ np.array(weights_S)
    return chosen_P


def normal_best_of(count: int) -> float:
    """The expected highest of ``count`` standard normal numbers (c_2 = 0.564, c_4 = 1.029, c_8 = 1.424)."""
    x = np.linspace(-10, 10, 20_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.clip((np.cumsum(density) - density / 2) * (x[1] - x[0]), 0, 1)
    return float(np.sum(x * count * density * below ** (count - 1)) * (x[1] - x[0]))


def of(student: Student, steps: int, size: Size) -> WithinPrompt | None:
    """The measurement for a student's pictures at this step count and size, else at these steps alone."""
    known = student.within_prompt or {}
    return known.get(at_key(student, steps, size)) or known.get(str(steps))


def predicted_gain(known: WithinPrompt, chooser: str, reported: str, count: int) -> float | None:
    """How far the best of ``count`` by the scorer ``chooser`` is above the prompt's mean, according to ``reported``.

    On the chooser itself: as measured with the bundle, and beyond the measured counts c_N times the spread. On another
    scorer: that gain in standard deviations within the prompt, times the correlation of the two. None if one of them
    was not measured.
    """
    if not {chooser, reported} <= known.spread.keys():
        return None
    measured = known.gain.get(chooser, ())
    spread = known.spread[chooser]
    own = measured[count - 1] if count <= len(measured) else normal_best_of(count) * spread
    if reported == chooser:
        return own
    correlation = known.correlation.get(" ".join(sorted((chooser, reported))))
    return None if correlation is None or not spread else correlation * known.spread[reported] * own / spread


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def _correlation(a_PS: Array, b_PS: Array) -> float:
    scale = math.sqrt(float((a_PS**2).sum() * (b_PS**2).sum()))
    return float((a_PS * b_PS).sum()) / scale if scale else 0.0
