"""The exact judge: a program, not a network, that checks an image against its caption.

It is for evaluation only; nothing trains on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

from training.shapes.grammar import Caption
from training.shapes.objects import Found, Picture, read
from training.shapes.templates import FloatArray
from training.shapes.world import SIDE_PX

# Longer side of the bounding box, as a fraction of the image's side, from which an object is large.
LARGE_FROM_SINGLE = 0.42
LARGE_FROM_PAIR = 0.345
_MOST_THINGS = 4  # beyond these the picture is wrong anyway; only the largest are compared


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption an image gets right; a part that the caption leaves out counts as right."""

    objects: bool
    color: bool
    shape: bool
    size: bool
    relation: bool
    background: bool

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return self.right_but_shape and self.shape

    @property
    def right_but_shape(self) -> bool:
        """Whether everything but the shape is right."""
        return self.objects and self.color and self.size and self.relation and self.background


_NOTHING = Found(None, None, math.nan, math.nan, (0, 0, 0, 0))


def judge(image_CHW: FloatArray, caption: Caption) -> Verdict:
    """Compare an RGB image in [0, 1], shape (3, 64, 64), with a caption.

    Raises:
        ValueError: the image has another shape.
    """
    if image_CHW.shape != (3, SIDE_PX, SIDE_PX):
        raise ValueError(f"the judge reads images of shape (3, {SIDE_PX}, {SIDE_PX}), not {image_CHW.shape}")
    return compare(read(image_CHW), caption)


def compare(picture: Picture, caption: Caption) -> Verdict:
    """Compare what was read from an image with a caption."""
    wanted = caption.things
    things = picture.things[:_MOST_THINGS] + (_NOTHING,) * (len(wanted) - len(picture.things))
    # Colours say which object is which before sizes do, and shapes, the least sure, come last.
    best = max(_hits(caption, chosen) for chosen in permutations(things, len(wanted)))
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
    """The share of verdicts in which each part is right, and ``right`` and ``right_but_shape``.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("there are no verdicts to summarise")
    names = [field.name for field in fields(Verdict)] + ["right", "right_but_shape"]
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


def _hits(caption: Caption, chosen: Sequence[Found]) -> tuple[int, int, int, bool]:
    """How many colours, sizes and shapes agree, thing by thing, and whether the relation holds."""
    large_from_px = SIDE_PX * (LARGE_FROM_SINGLE if len(chosen) == 1 else LARGE_FROM_PAIR)
    pairs = list(zip(caption.things, chosen, strict=True))
    color = sum(thing.color == found.color for thing, found in pairs)
    size = sum(thing.size in (None, _size(found, large_from_px)) for thing, found in pairs)
    shape = sum(thing.shape == found.shape for thing, found in pairs)
    relation = caption.relation is None or _relation(chosen[0], chosen[1]) == caption.relation
    return color, size, shape, relation


def _size(found: Found, large_from_px: float) -> str | None:
    if found is _NOTHING:
        return None
    return "large" if found.extent_px >= large_from_px else "small"


def _relation(first: Found, second: Found) -> str | None:
    """Where ``first`` lies as seen from ``second``, by the axis on which they are further apart."""
    right, down = first.x_px - second.x_px, first.y_px - second.y_px
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return None
