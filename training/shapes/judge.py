"""The exact judge: a program, not a network, that reads an image against its caption.

It is for evaluation only; nothing trains on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

from training.shapes.grammar import Caption, Thing
from training.shapes.objects import Found, read
from training.shapes.templates import FloatArray, match
from training.shapes.world import SIDE_PX

# Longer side of the bounding box, as a fraction of the image's side, from which an object is large.
LARGE_FROM_SINGLE = 0.42
LARGE_FROM_PAIR = 0.345
_MOST_THINGS = 4  # beyond these the picture is wrong anyway; only the largest are compared


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption hold in an image; a part that the caption leaves out holds."""

    objects: bool
    color: bool
    shape: bool
    size: bool
    relation: bool
    background: bool

    @property
    def right(self) -> bool:
        """Everything holds."""
        return self.right_but_shape and self.shape

    @property
    def right_but_shape(self) -> bool:
        """Everything but the shape holds."""
        return self.objects and self.color and self.size and self.relation and self.background


@dataclass(frozen=True)
class _Seen:
    color: str | None
    shape: str | None
    size: str | None
    x_px: float
    y_px: float


_NOTHING = _Seen(None, None, None, math.nan, math.nan)


def judge(image_CHW: FloatArray, caption: Caption) -> Verdict:
    """Compare an RGB image in [0, 1], shape (3, 64, 64), with a caption.

    Raises:
        ValueError: the image has another shape.
    """
    if image_CHW.shape != (3, SIDE_PX, SIDE_PX):
        raise ValueError(f"the judge reads images of shape (3, {SIDE_PX}, {SIDE_PX}), not {image_CHW.shape}")
    picture = read(image_CHW)
    wanted = caption.things
    large_from = LARGE_FROM_SINGLE if len(wanted) == 1 else LARGE_FROM_PAIR
    seen = [_see(thing, large_from) for thing in picture.things[:_MOST_THINGS]]
    seen += [_NOTHING] * (len(wanted) - len(seen))
    # Colours say which object is which before sizes do, and shapes, the least sure, come last.
    best = max(_hits(wanted, chosen, caption.relation) for chosen in permutations(seen, len(wanted)))
    color, size, shape, relation = best
    return Verdict(
        objects=len(picture.things) == len(wanted),
        color=color == len(wanted),
        shape=shape == len(wanted),
        size=size == len(wanted),
        relation=relation,
        background=caption.background in (None, picture.background),
    )


def judge_batch(images_BCHW: FloatArray, captions: Sequence[Caption]) -> list[Verdict]:
    """Judge B images, shape (B, 3, 64, 64) in [0, 1], each against its own caption."""
    return [judge(image_CHW, caption) for image_CHW, caption in zip(images_BCHW, captions, strict=True)]


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of verdicts in which each part holds, and ``right`` and ``right_but_shape``.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("there are no verdicts to sum up")
    names = [field.name for field in fields(Verdict)] + ["right", "right_but_shape"]
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


def _see(thing: Found, large_from: float) -> _Seen:
    size = "large" if thing.extent >= large_from else "small"
    return _Seen(thing.color, match(thing.cover_HW, thing.box).shape, size, thing.x_px, thing.y_px)


def _hits(wanted: Sequence[Thing], seen: Sequence[_Seen], relation: str | None) -> tuple[int, int, int, bool]:
    """How many colours, sizes and shapes agree, and whether the relation holds."""
    pairs = list(zip(wanted, seen, strict=True))
    color = sum(thing.color == found.color for thing, found in pairs)
    size = sum(thing.size in (None, found.size) for thing, found in pairs)
    shape = sum(thing.shape == found.shape for thing, found in pairs)
    return color, size, shape, relation is None or _relation(seen[0], seen[1]) == relation


def _relation(first: _Seen, second: _Seen) -> str | None:
    """Where ``first`` lies as seen from ``second``, by the axis on which they are further apart."""
    right, down = first.x_px - second.x_px, first.y_px - second.y_px
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return None
