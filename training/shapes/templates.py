"""Which of the eight shapes a silhouette is: overlap with templates drawn by the world's own distances.

A silhouette is cut out at its bounding box and scaled to 24x24, so place and size do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from training.shapes.grammar import SHAPES
from training.shapes.world import PAIR_SCALE, RADIUS, SIDE_PX, distance_NHW

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

GRID = 24
# Small shapes lose their tips to the pixel grid, so each is drawn at the sizes and sub-pixel places that occur.
_RADII_PX = tuple(SIDE_PX * radius * scale for radius in RADIUS for scale in (PAIR_SCALE, 1.0))
_OFFSETS_PX = (0.0, 0.5)
MIN_OVERLAP = 0.8
MAX_STRETCH = 1.3


@dataclass(frozen=True)
class _Bank:
    mask_TP: FloatArray  # T templates of GRID * GRID values, each 0 or 1
    aspect_T: FloatArray  # width / height of the box that each was cut from
    shape_T: NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """The shape that overlaps best; ``shape`` is None when none overlaps well enough."""

    shape: str | None
    best: str
    overlap: float


def bounding_box(mask_HW: BoolArray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the true pixels; right and bottom are one past the last."""
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut_out(cover_HW: FloatArray, box: tuple[int, int, int, int]) -> BoolArray:
    """The silhouette in ``box``, sampled bilinearly on a 24x24 grid and cut at half cover."""
    left, top, right, bottom = box
    rows = _weights(bottom - top)
    columns = _weights(right - left)
    cut: BoolArray = rows @ cover_HW[top:bottom, left:right] @ columns.T > 0.5
    return cut


@cache
def _weights(length: int) -> FloatArray:
    """Linear interpolation from ``length`` pixels to GRID samples, as a (GRID, length) matrix."""
    at = np.clip((np.arange(GRID) + 0.5) * length / GRID - 0.5, 0, length - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(length)), 0, 1)


@cache
def _bank() -> _Bank:
    rows = list(product(range(len(SHAPES)), _RADII_PX, _OFFSETS_PX, _OFFSETS_PX))
    shape_T = np.array([row[0] for row in rows])
    radius, x, y = (torch.tensor([row[i] for row in rows], dtype=torch.float32) for i in (1, 2, 3))
    centre = SIDE_PX / 2
    distance_THW = distance_NHW(torch.from_numpy(shape_T), x + centre, y + centre, radius)
    cover_THW = (0.5 - distance_THW).clamp(0, 1).numpy().astype(np.float64)
    boxes = [bounding_box(cover_HW > 0.5) for cover_HW in cover_THW]
    masks = [cut_out(cover_HW, box).ravel() for cover_HW, box in zip(cover_THW, boxes, strict=True)]
    aspects = [(box[2] - box[0]) / (box[3] - box[1]) for box in boxes]
    return _Bank(np.array(masks, dtype=np.float64), np.array(aspects), shape_T)


def match(cover_HW: FloatArray, box: tuple[int, int, int, int]) -> Match:
    """Compare a silhouette (cover in [0, 1]) with the templates by intersection over union."""
    bank = _bank()
    mask_P = cut_out(cover_HW, box).ravel().astype(np.float64)
    both_T = bank.mask_TP @ mask_P
    overlap_T = both_T / (bank.mask_TP.sum(1) + mask_P.sum() - both_T)
    stretch_T = np.abs(np.log((box[2] - box[0]) / (box[3] - box[1]) / bank.aspect_T))
    best = int(np.argmax(overlap_T))
    shape, overlap = SHAPES[bank.shape_T[best]], float(overlap_T[best])
    fits = overlap >= MIN_OVERLAP and stretch_T[best] <= np.log(MAX_STRETCH)
    return Match(shape if fits else None, shape, overlap)
