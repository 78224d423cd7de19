"""The starter world's measuring instruments: its models opened from disk, its scorers, judge and features.

Legend: B images, C channels, H/W latent cells or pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import shapes as rewards
from rewards.tokenized import Tokenized
from student.bundle import BundleError, ImageSize, Latents, hash_weights
from student.families.flux import Flux
from student.pipeline import open_pipeline
from training.evaluate import Measure, ScoreFn
from training.shapes import vocabulary
from training.shapes.judging import judge_prompts
from training.shapes.world import SIDE_PX

CACHE = Path.home() / ".cache" / "fewstep" / "evaluation"


@dataclass(frozen=True)
class Opened:
    """A pipeline of the starter world, ready to draw."""

    pipe: Any
    model: Flux
    latents: Latents
    image: ImageSize


def open_model(path: Path) -> Opened:
    """Open a teacher or a student.

    Raises:
        BundleError: the folder holds no diffusers pipeline.
    """
    if not (path / "model_index.json").is_file():
        raise BundleError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    pipe = open_pipeline(path)
    vae, side = pipe.vae.config, SIDE_PX // pipe.vae_scale_factor
    latents = Latents(side, side, pipe.transformer.config.in_channels // 4, 2, vae.scaling_factor, vae.shift_factor)
    return Opened(pipe, Flux(pipe, max_tokens=vocabulary.MAX_TOKENS), latents, ImageSize(SIDE_PX, SIDE_PX))


@dataclass(frozen=True)
class Instruments:
    """The measure, and the sha256 of each scorer's weights."""

    measure: Measure
    sources: Mapping[str, str]

    def key(self) -> str:
        """What figures depend on beside the model: the scorers' weights."""
        return "".join(self.sources.values())


def instruments(opened: Opened, scorers: Mapping[str, Path]) -> Instruments:
    """Frozen scorers from their folders, the exact judge, and autoencoder latents for diversity."""
    functions = {name: _score_fn(rewards.load(path), opened) for name, path in scorers.items()}
    sources = {name: hash_weights(path) for name, path in scorers.items()}
    return Instruments(Measure(functions, judge_prompts, _latent_features(opened.model)), sources)


def _score_fn(scorer: rewards.Scorer, opened: Opened) -> ScoreFn:
    return Tokenized(scorer, lambda texts: opened.model.tokenise(texts)[0]).score


def _latent_features(model: Flux) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def features(images_BCHW: Tensor) -> Tensor:
        return torch.cat([model.vae.encoder(part * 2 - 1) for part in images_BCHW.split(64)])

    return features
