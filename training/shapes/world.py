"""Scenes of the starter world: sampled from a seed, drawn by signed distance.

Shape suffixes: N images, K=2 objects, C channels, H/W pixels.
All lengths are pixels of a 64x64 image; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.shapes.grammar import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    CaptionObject,
)

SIDE_PX = 64
RADIUS = (0.17, 0.28)  # small, large; fraction of the side
PAIR_SCALE = 0.82
RADIUS_JITTER = 0.06
SINGLE_JITTER = 0.15
PAIR_OFFSET = 0.25
PAIR_JITTER = 0.04
GAP_PX = 2.0
MARGIN_PX = 1.0

# How far each shape reaches from its centre, in radii: left/right, up, down.
_REACH = np.array(
    [
        (1.0, 1.0, 1.0),  # circle
        (0.85, 0.85, 0.85),  # square
        (0.953, 1.1, 0.55),  # triangle
        (1.1, 1.1, 1.1),  # diamond
        (1.02, 1.02, 1.02),  # ring
        (1.0, 1.0, 1.0),  # cross
        (1.046, 1.1, 0.89),  # star
        (1.0, 0.915, 0.915),  # heart
    ]
)
_TIP_PX = 0.5  # a tip is thinner than a pixel for about this long
_POINTED = np.array([shape in ("triangle", "diamond", "star") for shape in SHAPES])

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Scenes:
    """N scenes as arrays. ``count_N`` is 1 or 2; a single scene ignores column 1 and ``relation_N``."""

    count_N: IntArray
    size_NK: IntArray
    color_NK: IntArray
    shape_NK: IntArray
    relation_N: IntArray
    background_N: IntArray
    x_NK: FloatArray
    y_NK: FloatArray
    radius_NK: FloatArray

    def __len__(self) -> int:
        return len(self.count_N)

    def take(self, index: IntArray) -> Scenes:
        """The scenes at ``index``, in that order."""
        return Scenes(**{name: value[index] for name, value in vars(self).items()})

    def caption(self, i: int) -> Caption:
        """The full caption of scene ``i``."""
        count = int(self.count_N[i])
        things = tuple(
            CaptionObject(SIZES[self.size_NK[i, k]], COLORS[self.color_NK[i, k]], SHAPES[self.shape_NK[i, k]])
            for k in range(count)
        )
        relation = RELATIONS[self.relation_N[i]] if count == 2 else None
        return Caption(things, relation, BACKGROUNDS[self.background_N[i]])

    def captions(self) -> list[str]:
        """The full captions of all scenes, in the grammar's words."""
        return [self.caption(i).text() for i in range(len(self))]


def rng(*key: int) -> np.random.Generator:
    """A counter-based generator: the same key gives the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def sample(num: int, *key: int) -> Scenes:
    """Draw ``num`` scenes; one third are single objects. Deterministic in ``key``."""
    gen = rng(*key)
    scenes = Scenes(
        count_N=np.where(gen.random(num) < 1 / 3, 1, 2),
        size_NK=gen.integers(0, len(SIZES), (num, 2)),
        color_NK=gen.integers(0, len(COLORS), (num, 2)),
        shape_NK=gen.integers(0, len(SHAPES), (num, 2)),
        relation_N=gen.integers(0, len(RELATIONS), num),
        background_N=gen.integers(0, len(BACKGROUNDS), num),
        x_NK=np.zeros((num, 2)),
        y_NK=np.zeros((num, 2)),
        radius_NK=np.zeros((num, 2)),
    )
    return place(scenes, gen)


def chosen(num: int, first: int, choose: Callable[[Scenes], IntArray], *key: int) -> Scenes:
    """``num`` scenes, whose places ``choose`` returns: of ``first`` that are drawn, or of twice as many where these are
    too few, and so on. Deterministic in ``key``.
    """
    while True:
        drawn = sample(first, *key)
        places = choose(drawn)[:num]
        if len(places) == num:
            return drawn.take(places)
        first *= 2


def place(scenes: Scenes, gen: np.random.Generator) -> Scenes:
    """Sample centres and radii, again where an object touches the frame or the other object.

    Two large diamonds side by side need almost every pixel of the row: scenes that still do not fit after 40 attempts
    get the smallest radii and no jitter, which always fits.
    """
    num = len(scenes)
    x_NK, y_NK, radius_NK = np.zeros((num, 2)), np.zeros((num, 2)), np.zeros((num, 2))
    todo = np.arange(num)
    for attempt in range(41):
        part = scenes.take(todo)
        x, y, radius = _draw_places(part, gen, tight=attempt == 40)
        x_NK[todo], y_NK[todo], radius_NK[todo] = x, y, radius
        todo = todo[~_fits(part, x, y, radius)]
        if len(todo) == 0:
            break
    return replace(scenes, x_NK=x_NK, y_NK=y_NK, radius_NK=radius_NK)


def _draw_places(scenes: Scenes, gen: np.random.Generator, tight: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    num = len(scenes)
    pair_N1 = (scenes.count_N == 2)[:, None]
    wiggle = gen.uniform(-1, 1, (3, num, 2)) * (0 if tight else 1)
    wiggle[0] -= 1 if tight else 0
    radius = np.array(RADIUS)[scenes.size_NK] * (1 + RADIUS_JITTER * wiggle[0])
    radius = radius * np.where(pair_N1, PAIR_SCALE, 1.0) * SIDE_PX
    jitter = np.where(pair_N1, PAIR_JITTER, SINGLE_JITTER)
    x, y = 0.5 + jitter * wiggle[1], 0.5 + jitter * wiggle[2]
    # "A left of B": A's offset along x is negative; "above": along y.
    sign = np.array([-1.0, 1.0, -1.0, 1.0])[scenes.relation_N][:, None] * np.array([[1.0, -1.0]]) * PAIR_OFFSET
    along_x = (scenes.relation_N < 2)[:, None]
    x = x + np.where(pair_N1 & along_x, sign, 0.0)
    y = y + np.where(pair_N1 & ~along_x, sign, 0.0)
    return x * SIDE_PX, y * SIDE_PX, radius


def _fits(scenes: Scenes, x: FloatArray, y: FloatArray, radius: FloatArray) -> NDArray[np.bool_]:
    reach = _REACH[scenes.shape_NK] * radius[..., None] - _TIP_PX * _POINTED[scenes.shape_NK][..., None]
    left, right = x - reach[..., 0], x + reach[..., 0]
    top, bottom = y - reach[..., 1], y + reach[..., 2]
    edge = np.minimum(np.minimum(left, top), SIDE_PX - np.maximum(right, bottom))
    gap_x = np.maximum(left[:, 1] - right[:, 0], left[:, 0] - right[:, 1])
    gap_y = np.maximum(top[:, 1] - bottom[:, 0], top[:, 0] - bottom[:, 1])
    gap = np.where(scenes.relation_N < 2, gap_x, gap_y)
    single_ok = edge[:, 0] >= MARGIN_PX
    pair_ok = (edge.min(1) >= MARGIN_PX) & (gap >= GAP_PX)
    fits: NDArray[np.bool_] = np.where(scenes.count_N == 1, single_ok, pair_ok)
    return fits


def _polygon(points: list[tuple[float, float]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Signed distance to a simple polygon (Quilez, "2D distance functions")."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        best = torch.full_like(x, 1e9)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
            ex, ey = bx - ax, by - ay
            wx, wy = x - ax, y - ay
            t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            best = torch.minimum(best, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
            if ey != 0:
                crosses = (y >= ay) != (y >= by)
                inside ^= crosses & (x < ax + ex * (y - ay) / ey)
        root = best.sqrt()
        return torch.where(inside, -root, root)

    return distance


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    dx, dy = x.abs() - half_x, y.abs() - half_y
    outside = (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    half = 1.1 / 2**0.5
    return _box((x + y) / 2**0.5, (x - y) / 2**0.5, half, half)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its tip and two half circles on its upper sides; 2 wide, 1.83 high."""
    side = 1.1716
    y = y - (0.8536 - 0.7071) / 2 * side
    body = _box((x + y) / 2**0.5, (x - y) / 2**0.5, side / 2, side / 2)
    lobe = ((x.abs() - side / 8**0.5) ** 2 + (y + side / 8**0.5) ** 2).sqrt() - side / 2
    return torch.minimum(body, lobe)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, folded onto one half wedge: outer tip at 1.1, inner corner at 0.45."""
    wedge = torch.pi / 5
    fold = torch.remainder(torch.atan2(x, -y) + wedge, 2 * wedge) - wedge
    reach = (x**2 + y**2).sqrt()
    px, py = reach * fold.abs().sin(), reach * fold.cos() - 1.1
    ex, ey = 0.45 * math.sin(wedge), 0.45 * math.cos(wedge) - 1.1
    t = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    distance = ((px - ex * t) ** 2 + (py - ey * t) ** 2).sqrt()
    return torch.where(px * ey - py * ex > 0, -distance, distance)


# Signed distances at unit radius, in the order of SHAPES.
_DISTANCE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: (x**2 + y**2).sqrt() - 1.0,
    lambda x, y: _box(x, y, 0.85, 0.85),
    _polygon([(0.0, -1.1), (0.9526, 0.55), (-0.9526, 0.55)]),
    _diamond,
    lambda x, y: ((x**2 + y**2).sqrt() - 0.78).abs() - 0.24,
    lambda x, y: torch.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0)),
    _star,
    _heart,
)


def distance_NHW(shape_N: Tensor, x_N: Tensor, y_N: Tensor, radius_N: Tensor) -> Tensor:
    """Signed distance in pixels from every pixel centre to one object per image."""
    grid = torch.arange(SIDE_PX, dtype=torch.float32) + 0.5
    out = torch.empty(len(shape_N), SIDE_PX, SIDE_PX)
    for kind in range(len(SHAPES)):
        at = (shape_N == kind).nonzero()[:, 0]
        if len(at) == 0:
            continue
        scale = radius_N[at, None, None]
        x = ((grid[None, None, :] - x_N[at, None, None]) / scale).expand(-1, SIDE_PX, -1)
        y = ((grid[None, :, None] - y_N[at, None, None]) / scale).expand(-1, -1, SIDE_PX)
        out[at] = _DISTANCE[kind](x, y) * scale
    return out


COLORS_RGB = torch.tensor([COLOR_RGB[c] for c in COLORS])
BACKGROUNDS_RGB = torch.tensor([BACKGROUND_RGB[b] for b in BACKGROUNDS])


def coverage_NKHW(scenes: Scenes) -> Tensor:
    """How much of each pixel each object covers, in [0, 1] (one pixel of anti-aliasing)."""
    cover = torch.zeros(len(scenes), 2, SIDE_PX, SIDE_PX)
    for k in range(2):
        at = np.flatnonzero(scenes.count_N > k)
        columns = (scenes.x_NK, scenes.y_NK, scenes.radius_NK)
        x, y, radius = (torch.from_numpy(c[at, k].astype(np.float32)) for c in columns)
        shape = torch.from_numpy(scenes.shape_NK[at, k])
        cover[at, k] = (0.5 - distance_NHW(shape, x, y, radius)).clamp(0, 1)
    return cover


def render_NCHW(scenes: Scenes) -> Tensor:
    """Draw the scenes: float32 RGB in [0, 1], shape (N, 3, 64, 64)."""
    image = BACKGROUNDS_RGB[scenes.background_N][:, :, None, None].expand(-1, -1, SIDE_PX, SIDE_PX)
    cover = coverage_NKHW(scenes)
    for k in range(2):
        ink = COLORS_RGB[scenes.color_NK[:, k]][:, :, None, None]
        image = torch.lerp(image, ink.expand_as(image), cover[:, k : k + 1])
    return image.contiguous()
