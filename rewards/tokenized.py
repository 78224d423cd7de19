"""The starter world's scorers as rewards: they read token ids, so a tokenizer comes with them.

Shape suffixes: B batch, C channels, H/W pixels, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rewards import shapes
from rewards.interface import RewardError, sent
from rewards.preprocess import Preprocess
from rewards.twostage import PromptTokenizer, TwoStage

SIDE_PX = 64
Tokenize = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class CustomTokenizer:
    """Prompts tokenised by a function of the caller's."""

    tokenize: Tokenize

    def read(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """See ``PromptTokenizer.read``."""
        return (self.tokenize(prompts),)


class Tokenized(TwoStage):
    """A scorer of (images, token ids) as a reward of (images, prompts); other sizes are stretched to its own."""

    def __init__(self, scorer: shapes.Scorer, words: PromptTokenizer | CustomTokenizer) -> None:
        super().__init__()
        self.scorer, self.words = scorer, words  # type: ignore[assignment]
        self.preprocess = Preprocess(SIDE_PX, "stretch", normalise=False)
        self.freeze()

    def judge(self, pixels_BCHW: Tensor, *words_BL: Tensor) -> Tensor:
        """Raw scores (B,)."""
        score_B: Tensor = self.scorer(pixels_BCHW.to(self.dtype), *words_BL)
        return score_B

    def forward(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,).

        Raises:
            RewardError: the tokenizer does not belong to the scorer.
        """
        assert self.words is not None
        (ids_BL,), config = self.words.read(prompts), self.scorer.config
        if int(ids_BL.max()) >= config.vocab_size or ids_BL.shape[1] > config.max_tokens:
            raise RewardError(
                f"the tokenizer returned {ids_BL.shape[1]} tokens with ids up to {int(ids_BL.max())}, but the scorer "
                f"reads {config.max_tokens} with ids below {config.vocab_size}: it is not this scorer's tokenizer"
            )
        return self.judge(self.preprocess(images_BCHW), sent(ids_BL, self.device))


def load(folder: Path, tokenizer: Tokenize | Path | None) -> Tokenized:
    """The scorer in ``folder``; ``tokenizer`` is a function, or the folder of one (default: the scorer's own).

    Raises:
        RewardError: there is no scorer, or no tokenizer.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise RewardError(f"{folder} is not a scorer of the starter world: it has no {name}")
    try:
        scorer = shapes.load(folder)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise RewardError(
            f"{folder} is not a scorer of the starter world: its weights and config.json are of another model"
        ) from error
    words = CustomTokenizer(tokenizer) if callable(tokenizer) else open_tokenizer(tokenizer or folder, scorer.config)
    return Tokenized(scorer, words)


def open_tokenizer(folder: Path, config: shapes.ScorerConfig) -> PromptTokenizer:
    """The tokenizer in ``folder``, cut and padded to the scorer's length.

    Raises:
        RewardError: there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise RewardError(
            f"{folder} has no tokenizer.json: a scorer of the starter world needs its teacher's tokenizer "
            "(the folder tokenizer of the teacher's pipeline)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise RewardError(f"the tokenizer in {folder} cannot be read: {error}") from error

    return PromptTokenizer(tokenizer, config.max_tokens, fixed=True)
