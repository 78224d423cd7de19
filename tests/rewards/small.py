"""Rewards of the published classes, tiny and random, made without a file (``tests.rewards.small:NAME``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipVisionModel, CLIPModel, CLIPTokenizer
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.aesthetic import AestheticReward, Head
from rewards.clip import ClipReward
from rewards.imagereward import ImageReward
from tests.rewards import published
from tests.rewards.test_imagereward import WORDS, tiny


def clip_model(seed: int = 3, **options: Any) -> CLIPModel:
    model = CLIPModel(published.clip_config(**options)).eval().requires_grad_(False)
    published.randomise(model, seed)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    merges = [tuple(pair) for pair in published.MERGES]
    return CLIPTokenizer(vocab=published.vocabulary(), merges=merges, model_max_length=40)


class Pick(ClipReward):
    def __init__(self) -> None:
        super().__init__(clip_model(eos_token_id=2), clip_tokenizer(), scaled=True)


class Clip(ClipReward):
    def __init__(self) -> None:
        super().__init__(clip_model(5, act="quick_gelu"), clip_tokenizer())


class Hps(ClipReward):
    def __init__(self) -> None:
        super().__init__(clip_model(7), clip_tokenizer(), fit="pad")


class Aesthetic(AestheticReward):
    def __init__(self) -> None:
        head = Head(16)
        published.randomise(head, 9)
        super().__init__(clip_model(11, act="quick_gelu"), head)


class Image(ImageReward):
    def __init__(self) -> None:
        architecture = tiny()
        text, vision = BlipTextModel(architecture.text, add_pooling_layer=False), BlipVisionModel(architecture.vision)
        head = Head(architecture.text.hidden_size)
        for seed, part in enumerate((text, vision, head)):
            published.randomise(part, seed)
        super().__init__(text, vision, head, BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}))


class EveryThird:
    """Ten lines of a user's, with a fault: each third picture that it is shown makes it raise."""

    differentiable = False

    def __init__(self) -> None:
        self.seen = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) > 1:
            raise RuntimeError("one at a time, please")
        self.seen += 1
        if self.seen % 3 == 0:
            raise RuntimeError("not this one")
        return images.mean((1, 2, 3))


class Constant:
    differentiable = False

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.ones(len(images))
