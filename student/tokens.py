"""Turns prompts into the token ids that the diffusers pipeline would feed its text encoders, without transformers.

Legend: B prompts, L tokens: the first tokenizer's ``model_max_length`` for CLIP, ``max_tokens`` for T5, and for a
language model ``max_tokens`` plus the part of its template that the family drops.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from student.prompts import CHATS, TOKENIZERS, cleaned

IdArray = NDArray[np.int64]

MASKED = frozenset({"wan", *CHATS})  # families whose encoder is told which of its ids are padding


class PromptTokens:
    """A bundle's tokenizers; ``names`` are the names of ``encode``'s arrays.

    SD3 without T5 has no tokenizer for it; Wan and the language models have a mask beside the ids of their one encoder.
    """

    def __init__(self, bundle: Path, max_tokens: int, family: str = "flux") -> None:
        folders = {name: bundle / folder for name, folder in TOKENIZERS[family].items() if (bundle / folder).is_dir()}
        self._chat = CHATS.get(family)
        lengths = {"t5_ids": max_tokens, "chat_ids": max_tokens + (self._chat.dropped if self._chat else 0)}
        side = "right" if self._chat is not None and self._chat.ends_are_cut else None
        self._tokenizers = {
            name: _tokenizer(folder, lengths.get(name) or _clip_length(bundle), side)
            for name, folder in folders.items()
        }
        self._masked = family in MASKED
        self.names = (*folders, *(f"{name.removesuffix('_ids')}_mask" for name in folders if self._masked))

    def encode(self, prompts: Sequence[str]) -> tuple[IdArray, ...]:
        """Ids for each encoder, int64 (B, L) each (and their mask); an unknown word becomes the unknown token."""
        if self._masked:
            (tokenizer,) = self._tokenizers.values()
            read = cleaned if self._chat is None else self._chat.of
            return _masked_ids(tokenizer, [read(prompt) for prompt in prompts])
        return tuple(_ids(tokenizer, prompts) for tokenizer in self._tokenizers.values())

    def encode_clip(self, prompts: Sequence[str]) -> IdArray:
        """Ids of the first tokenizer alone, int64 (B, L): what the scorers read."""
        return _ids(self._tokenizers["clip_ids"], prompts)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return config


def _clip_length(bundle: Path) -> int:
    return int(_config(bundle / "tokenizer")["model_max_length"])


def _tokenizer(folder: Path, length: int, side: str | None) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = _config(folder)
    pad = config["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    tokenizer.enable_truncation(length)
    side = side or config.get("padding_side", "right")
    tokenizer.enable_padding(direction=side, length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> IdArray:
    rows = [encoding.ids for encoding in tokenizer.encode_batch([*prompts, ""])]
    return np.array(rows, dtype=np.int64)[:-1]  # the empty prompt gives the length where there are no prompts


def _masked_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[IdArray, IdArray]:
    encodings = tokenizer.encode_batch([*prompts, ""])
    ids, mask = ([getattr(row, name) for row in encodings] for name in ("ids", "attention_mask"))
    return np.array(ids, dtype=np.int64)[:-1], np.array(mask, dtype=np.int64)[:-1]
