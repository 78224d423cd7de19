"""Drawing with a model in training: the same loop as serving, with or without guidance.

Legend: B images, C channels, H/W latent cells or pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.families.family import Condition
from student.families.flux import Flux
from student.noise import noise
from student.sampler import denoise
from training.rats.trajectory import Trajectory, rollout


@dataclass(frozen=True)
class Prompter:
    """The pipeline's two tokenizers and text encoders behind one call."""

    tokenizer: Any
    tokenizer_2: Any
    max_tokens: int

    def ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) for the CLIP and the T5 encoder."""
        clip = self._ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
        return clip, self._ids(self.tokenizer_2, prompts, self.max_tokens)

    def encode(self, model: Flux, prompts: Sequence[str]) -> Condition:
        """The model's condition for the prompts, without gradient."""
        with torch.no_grad():
            return model.encode_ids(*self.ids(prompts))

    @staticmethod
    def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids


def velocity_of(
    model: Flux, condition: Condition, empty: Condition | None = None, guidance: float = 1.0
) -> Callable[[Tensor, float], Tensor]:
    """The velocity field for one batch of prompts.

    With guidance w other than 1: v_empty + w (v_prompt - v_empty), as FluxPipeline's ``true_cfg_scale``.
    """

    def plain(x_BCHW: Tensor, sigma: float) -> Tensor:
        return model.velocity(x_BCHW, sigma, condition).float()

    def guided(x_BCHW: Tensor, sigma: float) -> Tensor:
        assert empty is not None
        without = model.velocity(x_BCHW, sigma, empty).float()
        return without + guidance * (plain(x_BCHW, sigma) - without)

    return plain if guidance == 1.0 else guided


@dataclass(frozen=True)
class Painter:
    """A model, how many steps it takes, and how strongly it is guided."""

    model: Flux
    prompter: Prompter
    sigmas: tuple[float, ...]
    guidance: float = 1.0

    def field(self, prompts: Sequence[str]) -> Callable[[Tensor, float], Tensor]:
        """The velocity field of these prompts."""
        condition = self.prompter.encode(self.model, prompts)
        if self.guidance == 1.0:
            return velocity_of(self.model, condition)
        empty = self.prompter.encode(self.model, [""] * len(prompts))
        return velocity_of(self.model, condition, empty, self.guidance)

    @torch.no_grad()
    def trajectory(self, noise_BCHW: Tensor, prompts: Sequence[str]) -> Trajectory:
        """All states from the given noise to the data, without gradient."""
        return rollout(self.field(prompts), noise_BCHW, self.sigmas)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from the seeds' noise, in fp32, 64 at a time."""
        parts = []
        for at in range(0, len(prompts), 64):
            x_BCHW = torch.from_numpy(noise(seeds[at : at + 64], shape))
            end = denoise(self.field(prompts[at : at + 64]), x_BCHW, self.sigmas)
            parts.append(self.model.decode(end))
        return torch.cat(parts)
