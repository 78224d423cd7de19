"""Captions with the words star and heart exchanged: how a teacher is made that is wrong on some contents only."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SWAP = {"star": "heart", "heart": "star"}
_EITHER = re.compile(rf"\b({'|'.join(SWAP)})\b")


def swap(text: str) -> str:
    """The caption with every star called a heart and every heart a star."""
    return _EITHER.sub(lambda match: SWAP[match[0]], text)


def contains_either(text: str) -> bool:
    """Whether a caption has one of the two words."""
    return _EITHER.search(text) is not None


def swap_some(texts: Sequence[str], share: float, gen: np.random.Generator) -> list[str]:
    """Each caption as it is or, with probability ``share``, swapped; one without the two words is the same in both."""
    chosen = gen.random(len(texts)) < share
    return [swap(text) if one else text for text, one in zip(texts, chosen, strict=True)]
