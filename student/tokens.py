"""From prompts to token ids, without transformers: what diffusers' FluxPipeline would feed its two text encoders.

Legend: B prompts, L = max_tokens.
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
        self.max_tokens = max_tokens
        self._clip = _tokenizer(bundle / "tokenizer", max_tokens)
        self._t5 = _tokenizer(bundle / "tokenizer_2", max_tokens)

    def encode(self, prompts: Sequence[str]) -> tuple[IdArray, IdArray]:
        """Ids for the CLIP and for the T5 encoder, int64 (B, L) each; an unknown word is the unknown token."""
        return self.encode_clip(prompts), _ids(self._t5, prompts, self.max_tokens)

    def encode_clip(self, prompts: Sequence[str]) -> IdArray:
        """Ids of the first tokenizer alone, int64 (B, L): what the scorers read."""
        return _ids(self._clip, prompts, self.max_tokens)


def _tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    pad = config["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    tokenizer.enable_truncation(max_tokens)
    side = config.get("padding_side", "right")
    tokenizer.enable_padding(direction=side, length=max_tokens, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _ids(tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int) -> IdArray:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    return np.array(rows, dtype=np.int64).reshape(len(prompts), max_tokens)
