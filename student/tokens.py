"""From prompts to token ids, without transformers: what diffusers' FluxPipeline would feed its two text encoders.

Legend: B prompts, L tokens: the first tokenizer's ``model_max_length``, and ``max_tokens`` for the second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

IdArray = NDArray[np.int64]


class PromptTokens:
    """The bundle's two tokenizers: ``tokenizer/`` (CLIP and the scorers), ``tokenizer_2/`` (T5)."""

    def __init__(self, bundle: Path, max_tokens: int) -> None:
        self._clip = _tokenizer(bundle / "tokenizer", None)
        self._t5 = _tokenizer(bundle / "tokenizer_2", max_tokens)

    def encode(self, prompts: Sequence[str]) -> tuple[IdArray, IdArray]:
        """Ids for the CLIP and for the T5 encoder, int64 (B, L) each; an unknown word is the unknown token."""
        return self.encode_clip(prompts), _ids(self._t5, prompts)

    def encode_clip(self, prompts: Sequence[str]) -> IdArray:
        """Ids of the first tokenizer alone, int64 (B, L): what the scorers read."""
        return _ids(self._clip, prompts)


def _tokenizer(folder: Path, length: int | None) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    length = length or int(config["model_max_length"])
    pad = config["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    tokenizer.enable_truncation(length)
    side = config.get("padding_side", "right")
    tokenizer.enable_padding(direction=side, length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> IdArray:
    rows = [encoding.ids for encoding in tokenizer.encode_batch([*prompts, ""])]
    return np.array(rows, dtype=np.int64)[:-1]  # the empty prompt gives the length where there are no prompts
