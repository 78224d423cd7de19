"""The starter world's scorers as rewards: they read token ids, so a tokenizer comes with them.

Shape suffixes: B batch, C channels, H/W pixels, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rewards import shapes
from rewards.interface import Network, RewardError

SIDE_PX = 64
Tokenize = Callable[[Sequence[str]], Tensor]


class Tokenized(Network):
    """A scorer of (images, token ids) as a reward of (images, prompts); ``tokenize`` gives ids (B, L)."""

    def __init__(self, scorer: shapes.Scorer, tokenize: Tokenize) -> None:
        super().__init__()
        self.scorer, self.tokenize = scorer, tokenize
        self.freeze()

    def forward(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,).

        Raises:
            RewardError: images of another size, or a tokenizer that is not the scorer's.
        """
        if tuple(images_BCHW.shape[2:]) != (SIDE_PX, SIDE_PX):
            size = f"{images_BCHW.shape[2]}x{images_BCHW.shape[3]}"
            raise RewardError(f"images are {size} pixels: the starter world's scorers read {SIDE_PX}x{SIDE_PX}")
        ids_BL, config = self.tokenize(prompts), self.scorer.config
        if int(ids_BL.max()) >= config.vocab_size or ids_BL.shape[1] > config.max_tokens:
            raise RewardError(
                f"the tokenizer gave {ids_BL.shape[1]} tokens with ids up to {int(ids_BL.max())}, and the scorer "
                f"reads {config.max_tokens} with ids below {config.vocab_size}: it is not this scorer's tokenizer"
            )
        score_B: Tensor = self.scorer(images_BCHW.to(self.dtype), ids_BL.to(self.device))
        return score_B


def load(folder: Path, tokenizer: Tokenize | Path | None) -> Tokenized:
    """The scorer in ``folder``; ``tokenizer`` is a function, or the folder of one (default: the scorer's own).

    Raises:
        RewardError: no scorer there, or no tokenizer.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise RewardError(f"{folder} holds no scorer of the starter world: it has no {name}")
    try:
        scorer = shapes.load(folder)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise RewardError(f"{folder} holds no scorer of the starter world: its config.json says otherwise") from error
    return Tokenized(scorer, tokenizer if callable(tokenizer) else open_tokenizer(tokenizer or folder, scorer.config))


def open_tokenizer(folder: Path, config: shapes.ScorerConfig) -> Tokenize:
    """The tokenizer in ``folder``, cut and padded to the scorer's length.

    Raises:
        RewardError: there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise RewardError(
            f"{folder} has no tokenizer.json: a scorer of the starter world needs the tokenizer of its teacher "
            "(the folder tokenizer of the teacher's pipeline)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise RewardError(f"{folder} holds no tokenizer that can be read") from error

    def tokenize(prompts: Sequence[str]) -> Tensor:
        batch = tokenizer(
            list(prompts), padding="max_length", max_length=config.max_tokens, truncation=True, return_tensors="pt"
        )
        ids_BL: Tensor = batch.input_ids
        return ids_BL

    return tokenize
