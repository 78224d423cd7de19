"""Antialiased bicubic resizing as two matrices, equal to PIL's and torch's: so scorers accept images of any size.

Legend: H x W pixels of the picture, S the side of the square that a scorer reads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
A = -0.5  # of the cubic, where it is antialiased
PIL_BITS = 22  # of the fraction of a weight, where PIL resizes bytes


@functools.lru_cache(maxsize=64)
def matrices(fit: str, side: int, height: int, width: int) -> tuple[Matrix, Matrix]:
    """rows_SH and columns_WS: ``rows @ image @ columns`` is the picture as ``rewards.preprocess`` fits it.

    Where that resizes bytes (all but "pad"), the weights are PIL's own whole numbers.

    Raises:
        ValueError: an unknown fit.
    """
    if fit == "stretch":
        rows, columns = resize(height, side), resize(width, side)
    elif fit == "crop":
        short = min(height, width)
        rows, columns = (_cut(resize(n, int(side * n / short)), side) for n in (height, width))
    elif fit == "pad":
        scale = side / max(height, width)
        rows, columns = (_padded(resize(n, max(1, round(n * scale))), side) for n in (height, width))
    else:
        raise ValueError(f"fit is {fit!r}: accepted are stretch, crop and pad")
    if fit != "pad":
        rows, columns = _as_pil_rounds(rows), _as_pil_rounds(columns)
    return np.ascontiguousarray(rows), np.ascontiguousarray(columns.T)


def resize(source: int, target: int) -> Matrix:
    """(target, source): the weights of the old samples in each new one; each row adds up to 1."""
    scale = source / target
    filter_scale = max(scale, 1.0)
    support = 2 * filter_scale
    weights = np.zeros((target, source))
    for row in range(target):
        center = scale * (row + 0.5)
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source)
        part = _cubic((np.arange(first, last, dtype=np.float64) - center + 0.5) / filter_scale)
        weights[row, first:last] = part / part.sum()
    return weights


def _as_pil_rounds(weights: Matrix) -> Matrix:
    """Round halves away from zero (Resample.c, normalize_coeffs_8bpc)."""
    rounded: Matrix = np.copysign(np.floor(np.abs(weights) * 2**PIL_BITS + 0.5) / 2**PIL_BITS, weights)
    return rounded


def _cubic(x: NDArray[Any]) -> NDArray[Any]:
    x = np.abs(x)
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _cut(matrix: Matrix, side: int) -> Matrix:
    first = (len(matrix) - side) // 2
    return matrix[first : first + side]


def _padded(matrix: Matrix, side: int) -> Matrix:
    missing = side - len(matrix)
    return np.pad(matrix, ((missing // 2, missing - missing // 2), (0, 0)))
