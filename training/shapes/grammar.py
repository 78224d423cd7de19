"""The words of the starter world: which scenes exist and how captions describe them.

Grammar: ``OBJECT on a BG background`` or ``OBJECT REL OBJECT on a BG background``
with ``OBJECT = a SIZE COLOR SHAPE``.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("gray", "cream", "navy", "mint")

COLOR_RGB = {
    "red": (0.90, 0.16, 0.18),
    "green": (0.16, 0.70, 0.28),
    "blue": (0.15, 0.35, 0.90),
    "yellow": (0.98, 0.85, 0.15),
    "purple": (0.58, 0.22, 0.78),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.08),
}
BACKGROUND_RGB = {
    "gray": (0.55, 0.57, 0.60),
    "cream": (0.96, 0.91, 0.80),
    "navy": (0.07, 0.10, 0.28),
    "mint": (0.68, 0.90, 0.80),
}


@dataclass(frozen=True)
class CaptionObject:
    """One object of a caption; ``None`` is a word that the caption leaves out."""

    size: str | None
    color: str
    shape: str

    def words(self, article: bool = True) -> str:
        """The object in words: ``a small red heart``."""
        parts = [self.size, self.color, self.shape]
        text = " ".join(p for p in parts if p)
        return f"a {text}" if article else text


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for: one object, or two and their relation, on a background."""

    things: tuple[CaptionObject, ...]
    relation: str | None
    background: str | None

    def text(self, article: bool = True) -> str:
        """The caption in the grammar's words; without articles it is closer to what people type."""
        head = self.things[0].words(article)
        if self.relation is not None:
            head = f"{head} {self.relation} {self.things[1].words(article)}"
        if self.background is None:
            return head
        lead = "on a" if article else "on"
        return f"{head} {lead} {self.background} background"


def parse(prompt: str) -> Caption:
    """Read a prompt of the grammar, with parts left out or not.

    Raises:
        ValueError: a word or a word order that the grammar does not know.
    """
    words = [w for w in prompt.lower().replace(",", " ").replace(".", " ").split() if w not in ("a", "an", "the")]
    background = None
    if "on" in words:
        cut = words.index("on")
        tail = words[cut + 1 :]
        if len(tail) != 2 or tail[1] != "background" or tail[0] not in BACKGROUNDS:
            raise ValueError(f"cannot read the background of {prompt!r}: accepted is 'on a BG background'")
        background, words = tail[0], words[:cut]
    relation, halves = _split_at_relation(words)
    return Caption(tuple(_object(half, prompt) for half in halves), relation, background)


def _split_at_relation(words: list[str]) -> tuple[str | None, list[list[str]]]:
    text = " ".join(words)
    for relation in RELATIONS:
        left, found, right = text.partition(f" {relation} ")
        if found:
            return relation, [left.split(), right.split()]
    return None, [words]


def _object(words: list[str], prompt: str) -> CaptionObject:
    size = words[0] if words and words[0] in SIZES else None
    rest = words[1:] if size else words
    if len(rest) != 2 or rest[0] not in COLORS or rest[1] not in SHAPES:
        raise ValueError(f"cannot read {' '.join(words)!r} in {prompt!r}: accepted is [SIZE] COLOR SHAPE")
    return CaptionObject(size, rest[0], rest[1])
