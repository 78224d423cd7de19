"""Preference pairs that need no labels: captions and scenes with one thing wrong.

A style says which parts a caption leaves out; an altered scene differs in one part that the
style still names, so that the altered scene is wrong for the original's caption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training.shapes.grammar import Caption
from training.shapes.world import IntArray, Scenes

KINDS = ("size", "color", "shape", "relation", "background", "count", "swap")
# What people write around a caption; the words outside the grammar all become <unk>.
FILLERS = ("", "a picture of ", "please draw ", "an image with ", "show me ")
_CHOICES = {"size": 2, "color": 8, "shape": 8, "background": 4}


@dataclass(frozen=True)
class Styles:
    """Which parts each of N captions names, and which of FILLERS it begins with."""

    size_N: NDArray[np.bool_]
    background_N: NDArray[np.bool_]
    article_N: NDArray[np.bool_]
    filler_N: IntArray


def sample_styles(num: int, gen: np.random.Generator, drop: float = 0.2) -> Styles:
    """Leave out sizes, the background and the articles, each with probability ``drop``; one in ten has a filler."""
    named = gen.random((3, num)) >= drop
    filler = np.where(gen.random(num) < 0.1, gen.integers(1, len(FILLERS), num), 0)
    return Styles(named[0], named[1], named[2], filler)


def full_styles(num: int) -> Styles:
    """Captions that name everything."""
    named = np.ones(num, dtype=bool)
    return Styles(named, named, named, np.zeros(num, dtype=np.int64))


def captions(scenes: Scenes, styles: Styles) -> list[str]:
    """The caption of each scene in its style."""
    return [_styled(scenes.caption(i), styles, i) for i in range(len(scenes))]


def _styled(caption: Caption, styles: Styles, i: int) -> str:
    things = caption.things
    if not styles.size_N[i]:
        things = tuple(replace(thing, size=None) for thing in things)
    background = caption.background if styles.background_N[i] else None
    text = Caption(things, caption.relation, background).text(bool(styles.article_N[i]))
    return FILLERS[styles.filler_N[i]] + text


def alter(scenes: Scenes, styles: Styles, gen: np.random.Generator) -> tuple[Scenes, IntArray]:
    """Change one named part of each scene; also returns which of KINDS was changed.

    Only the fields change: draw new places with ``world.place`` before rendering.
    """
    num = len(scenes)
    weight = np.ones((num, len(KINDS))) * np.array([1.0, 1.2, 2.0, 1.0, 1.0, 0.6, 1.2])
    differs_NF = _differing(scenes, styles)
    weight[:, 0] *= styles.size_N
    weight[:, 3] *= scenes.count_N == 2
    weight[:, 4] *= styles.background_N
    weight[:, 6] *= differs_NF.any(1)
    cumulative = np.cumsum(weight / weight.sum(1, keepdims=True), 1)
    kind_N = np.minimum((gen.random((num, 1)) > cumulative).sum(1), len(KINDS) - 1)
    which_N = np.where(scenes.count_N == 2, gen.integers(0, 2, num), 0)
    fields = {name: value.copy() for name, value in vars(scenes).items()}
    rows = np.arange(num)
    for index, name in enumerate(("size", "color", "shape")):
        at = kind_N == index
        column = fields[f"{name}_NK"]
        shift = gen.integers(1, _CHOICES[name], num)
        column[rows[at], which_N[at]] = (column[rows[at], which_N[at]] + shift[at]) % _CHOICES[name]
    fields["relation_N"] = np.where(kind_N == 3, _other_relation(scenes, styles, gen), scenes.relation_N)
    other_background = (scenes.background_N + gen.integers(1, 4, num)) % 4
    fields["background_N"] = np.where(kind_N == 4, other_background, scenes.background_N)
    _change_count(fields, (kind_N == 5) & (scenes.count_N == 2), which_N)
    _swap(fields, np.where(kind_N == 6, _pick(differs_NF, gen), -1))
    fields["count_N"] = np.where(kind_N == 5, 3 - scenes.count_N, scenes.count_N)
    return Scenes(**fields), kind_N


def _differing(scenes: Scenes, styles: Styles) -> NDArray[np.bool_]:
    """Which of size, colour and shape the caption names and the two objects don't share: (N, 3)."""
    columns = (scenes.size_NK, scenes.color_NK, scenes.shape_NK)
    differs_NF = np.stack([column[:, 0] != column[:, 1] for column in columns], 1) & (scenes.count_N == 2)[:, None]
    differs_NF[:, 0] &= styles.size_N
    return differs_NF


def _pick(allowed_NF: NDArray[np.bool_], gen: np.random.Generator) -> IntArray:
    """The index of one allowed column in each row, all equally likely."""
    return np.where(allowed_NF, gen.random(allowed_NF.shape), -1.0).argmax(1)


def _swap(fields: dict[str, IntArray], part_N: IntArray) -> None:
    """Exchange size (0), colour (1) or shape (2) between the two objects; -1 leaves a scene as it is."""
    for index, name in enumerate(("size_NK", "color_NK", "shape_NK")):
        at = part_N == index
        fields[name][at] = fields[name][at][:, ::-1]


def _other_relation(scenes: Scenes, styles: Styles, gen: np.random.Generator) -> IntArray:
    """Another relation; between two objects that the caption cannot tell apart only across the axis."""
    num = len(scenes)
    same = (scenes.color_NK[:, 0] == scenes.color_NK[:, 1]) & (scenes.shape_NK[:, 0] == scenes.shape_NK[:, 1])
    same &= ~styles.size_N | (scenes.size_NK[:, 0] == scenes.size_NK[:, 1])
    anything = (scenes.relation_N + gen.integers(1, 4, num)) % 4
    across = (scenes.relation_N // 2 * 2 + 2 + gen.integers(0, 2, num)) % 4
    return np.where(same, across, anything)


def _change_count(fields: dict[str, IntArray], dropped_N: NDArray[np.bool_], which_N: IntArray) -> None:
    """Where a pair loses an object, keep the other one in column 0."""
    move = dropped_N & (which_N == 0)
    for name in ("size_NK", "color_NK", "shape_NK"):
        fields[name][move, 0] = fields[name][move, 1]
