"""Scorers whose preparation of prompts and pictures is separate from the network, so that export can compile them.

Shape suffixes: B batch, C channels, H/W pixels, L tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewards.interface import Network, sent
from rewards.preprocess import Preprocess


@dataclass(frozen=True)
class PromptTokenizer:
    """How a scorer reads prompts: ids, and with ``masked`` also which of them are words (1) or padding (0).

    Prompts are cut to ``length`` tokens; with ``fixed`` they are padded to it, else to the longest of a batch.
    ``pad_id``, if given, replaces the tokenizer's own padding.
    """

    tokenizer: Any
    length: int
    masked: bool = False
    fixed: bool = False
    pad_id: int | None = None

    def read(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids (B, L), int64, and the mask."""
        padding = "max_length" if self.fixed else True
        batch = self.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids_BL, mask_BL = batch.input_ids, batch.attention_mask
        if self.pad_id is not None:
            ids_BL = ids_BL.masked_fill(mask_BL == 0, self.pad_id)
        return (ids_BL, mask_BL) if self.masked else (ids_BL,)

    def cuts(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than ``length``, so that their ends are not read."""
        rows = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(ids) > self.length for ids in rows]


class TwoStage(Network):
    """``judge`` scores what ``preprocess`` makes of pictures and ``words`` of prompts (None: it reads no prompt)."""

    preprocess: Preprocess
    words: PromptTokenizer | None = None

    @abstractmethod
    def judge(self, pixels_BCHW: Tensor, *words_BL: Tensor) -> Tensor:
        """Raw scores (B,)."""

    def forward(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,)."""
        words = self.words.read(prompts) if self.words else ()
        return self.judge(self.preprocess(images_BCHW), *(sent(part, self.device) for part in words))
