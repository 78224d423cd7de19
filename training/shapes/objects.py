"""Finds the objects of an image without knowing its caption: colours first, then connected pixels.

Shape suffixes: C channels, H/W pixels, P = H * W pixels, R reference colours. Images are RGB in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.shapes.grammar import BACKGROUND_RGB, COLOR_RGB
from training.shapes.templates import BoolArray, Box, FloatArray, bounding_box, match

SHADES = (0.88, 1.0, 1.12)
BORDER_PX = 2
MIN_AREA_PX = 40  # the smallest object that the world draws, a star in a pair, covers 100
MIN_CORE_PX = 6
MAX_COLORS = 4
MIX_TOLERANCE = 0.08
MAX_COLOR_DISTANCE = 0.3
MIN_BORDER_SHARE = 0.8
BORDER_TOLERANCE = 0.15


def _shaded(colors: dict[str, tuple[float, float, float]]) -> tuple[tuple[str, ...], FloatArray]:
    names = tuple(name for name in colors for _ in SHADES)
    rgb_RC = np.array([colors[name] for name in colors])[:, None, :] * np.array(SHADES)[:, None]
    return names, np.clip(rgb_RC.reshape(-1, 3), 0, 1)


_BACKGROUND_NAMES, _BACKGROUND_RC = _shaded(BACKGROUND_RGB)
# A blob in a background's colour is an object too, but none that a caption can ask for.
_NAMES, _RGB_RC = _shaded(COLOR_RGB | BACKGROUND_RGB)


@dataclass(frozen=True)
class Found:
    """One object of an image; ``color`` and ``shape`` are None where they are not in the grammar."""

    color: str | None
    shape: str | None
    x_px: float
    y_px: float
    box: Box

    @property
    def extent_px(self) -> int:
        """The longer side of the bounding box."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


@dataclass(frozen=True)
class Picture:
    """The content of an image: the background's name (None: not in the grammar) and its objects, largest first."""

    background: str | None
    things: tuple[Found, ...]


def read(image_CHW: FloatArray) -> Picture:
    """Find the background and the objects of an RGB image in [0, 1]."""
    height, width = image_CHW.shape[1:]
    rgb_PC = np.asarray(image_CHW, dtype=np.float64).reshape(3, -1).T
    border_P = np.ones((height, width), dtype=bool)
    border_P[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    ground_C = np.median(rgb_PC[border_P.ravel()], axis=0)
    inks = _palette(rgb_PC, ground_C, (height, width))
    things = [] if not inks else _things(rgb_PC, *_owners(rgb_PC, ground_C, inks), (height, width))
    return Picture(_background(rgb_PC[border_P.ravel()], ground_C), tuple(things))


def _background(border_PC: FloatArray, ground_C: FloatArray) -> str | None:
    even = np.linalg.norm(border_PC - ground_C, axis=1) < BORDER_TOLERANCE
    distance_R = np.linalg.norm(_BACKGROUND_RC - ground_C, axis=1)
    if even.mean() < MIN_BORDER_SHARE or distance_R.min() > BORDER_TOLERANCE:
        return None
    return _BACKGROUND_NAMES[int(distance_R.argmin())]


def _palette(rgb_PC: FloatArray, ground_C: FloatArray, shape: tuple[int, int]) -> list[FloatArray]:
    """The colours of the objects, the one with most pixels first.

    The rim of an object mixes its colour with the background and can look like a third
    colour (white on navy has gray rims): what such a mix explains is no colour of its own.
    """
    own = _NAMES[int(np.linalg.norm(_RGB_RC - ground_C, axis=1).argmin())]
    use_R = np.array([name != own for name in _NAMES])
    distance_PR = np.linalg.norm(rgb_PC[:, None, :] - _RGB_RC[use_R], axis=2)
    index_P = np.flatnonzero(use_R)[distance_PR.argmin(1)] // len(SHADES)
    open_P = distance_PR.min(1) < np.linalg.norm(rgb_PC - ground_C, axis=1)
    inks: list[FloatArray] = []
    for _ in range(MAX_COLORS):
        cores = [_core((open_P & (index_P == i)).reshape(shape)) for i in range(len(_NAMES) // len(SHADES))]
        core = max(cores, key=np.count_nonzero).ravel()
        if np.count_nonzero(core) < MIN_CORE_PX:
            break
        inks.append(np.median(rgb_PC[core], axis=0))
        open_P &= _mix(rgb_PC, ground_C, inks[-1])[1] > MIX_TOLERANCE
    return inks


def _mix(rgb_PC: FloatArray, ground_C: FloatArray, ink_C: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Each pixel's share of ink over ground, and how far its colour is from any such mix."""
    step_C = ink_C - ground_C
    share_P = (rgb_PC - ground_C) @ step_C / (step_C @ step_C)
    nearest_PC = ground_C + np.clip(share_P, 0, max(SHADES))[:, None] * step_C
    return share_P, np.linalg.norm(rgb_PC - nearest_PC, axis=1)


def _grown(mask_HW: BoolArray) -> BoolArray:
    """The true pixels and their four neighbours."""
    padded = np.pad(mask_HW, 1)
    grown: BoolArray = mask_HW | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown


def _core(mask_HW: BoolArray) -> BoolArray:
    """The pixels whose four neighbours are true too: a rim two pixels wide has none."""
    core: BoolArray = ~_grown(~mask_HW)
    return core


def _owners(rgb_PC: FloatArray, ground_C: FloatArray, inks: list[FloatArray]) -> tuple[NDArray[np.int64], FloatArray]:
    """Whose mix with the background explains each pixel best, and that colour's share of it in [0, 1]."""
    share_KP, apart_KP = (np.array(part) for part in zip(*(_mix(rgb_PC, ground_C, ink) for ink in inks), strict=True))
    owner_P = apart_KP.argmin(0)
    return owner_P, np.clip(np.take_along_axis(share_KP, owner_P[None], 0)[0], 0, 1)


def _things(rgb_PC: FloatArray, owner_P: NDArray[np.int64], cover_P: FloatArray, shape: tuple[int, int]) -> list[Found]:
    owner_HW, cover_HW = owner_P.reshape(shape), cover_P.reshape(shape)
    parts = [part for k in range(owner_P.max() + 1) for part in components((owner_HW == k) & (cover_HW > 0.5))]
    whole = _without_fringes(sorted(parts, key=np.count_nonzero, reverse=True))
    return [_found(mask_HW, cover_HW, rgb_PC) for mask_HW in whole if _is_thing(mask_HW)]


def _without_fringes(parts: list[BoolArray]) -> list[BoolArray]:
    """Join thin parts to the larger one that they touch.

    Objects of the world never touch, so a thin part of another colour is the rim of an object
    whose edge a decoder has tinted.
    """
    whole: list[BoolArray] = []
    for part in parts:
        near = _grown(part)
        host = next((i for i, mask_HW in enumerate(whole) if (near & mask_HW).any()), None)
        if host is None or _core(_core(part)).any():
            whole.append(part)
        else:
            whole[host] = whole[host] | part
    return whole


def _is_thing(mask_HW: BoolArray) -> bool:
    return bool(mask_HW.sum() >= MIN_AREA_PX and _core(mask_HW).sum() >= MIN_CORE_PX)


def _found(mask_HW: BoolArray, cover_HW: FloatArray, rgb_PC: FloatArray) -> Found:
    rows, columns = np.nonzero(mask_HW)
    color = _color(np.median(rgb_PC[_core(mask_HW).ravel()], axis=0))
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    box = bounding_box(mask_HW)
    return Found(color, match(cover_HW * mask_HW, box).shape, x, y, box)


def _color(rgb_C: FloatArray) -> str | None:
    distance_R = np.linalg.norm(_RGB_RC - rgb_C, axis=1)
    name = _NAMES[int(distance_R.argmin())]
    return name if name in COLOR_RGB and distance_R.min() <= MAX_COLOR_DISTANCE else None


def components(mask_HW: BoolArray) -> list[BoolArray]:
    """The connected parts of a mask; pixels that touch by an edge are connected."""
    index = np.arange(mask_HW.size).reshape(mask_HW.shape)
    beside, below = mask_HW[:, :-1] & mask_HW[:, 1:], mask_HW[:-1] & mask_HW[1:]
    one = np.concatenate([index[:, :-1][beside], index[:-1][below]])
    other = np.concatenate([index[:, 1:][beside], index[1:][below]])
    root: NDArray[np.int64] = index.ravel()
    while True:
        lower = np.minimum(root[one], root[other])
        joined = root.copy()
        np.minimum.at(joined, root[one], lower)
        np.minimum.at(joined, root[other], lower)
        joined = joined[joined]
        if np.array_equal(joined, root):
            break
        root = joined
    root_HW = np.where(mask_HW, root.reshape(mask_HW.shape), -1)
    return [root_HW == label for label in np.unique(root_HW) if label >= 0]
