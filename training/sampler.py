"""Drawing with a model in training: the same loop as serving, with or without guidance.

Legend: B images, C channels, H/W latent cells or pixels; a video has an axis of frames more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student.families.family import Condition, Family
from student.noise import noise
from student.sampler import denoise
from training.rats.trajectory import Trajectory, rollout

Velocity = Callable[[Tensor, float], Tensor]


def velocity_of(model: Family, condition: Condition, empty: Condition | None = None, guidance: float = 1.0) -> Velocity:
    """The velocity field for one batch of prompts.

    With guidance w other than 1 as the family's pipeline does it: v_empty + w (v_prompt - v_empty), and the like.
    """

    def plain(x: Tensor, sigma: float) -> Tensor:
        return model.velocity(x, sigma, condition).float()

    def guided(x: Tensor, sigma: float) -> Tensor:
        assert empty is not None
        return model.guided(plain(x, sigma), model.velocity(x, sigma, empty).float(), guidance)

    return plain if guidance == 1.0 else guided


@dataclass(frozen=True)
class Sampler:
    """A model, the sigmas of its steps, how strongly it is guided, and away from what."""

    model: Family
    sigmas: tuple[float, ...]
    guidance: float = 1.0
    negative: str = ""

    def velocity(self, prompts: Sequence[str]) -> Velocity:
        """The velocity field of these prompts."""
        condition = self.model.encode(prompts)
        if self.guidance == 1.0:
            return velocity_of(self.model, condition)
        return velocity_of(self.model, condition, self.model.encode([self.negative] * len(prompts)), self.guidance)

    @torch.no_grad()
    def trajectory(self, noise_BCHW: Tensor, prompts: Sequence[str]) -> Trajectory:
        """All states from the given noise to the data, without gradient."""
        return rollout(self.velocity(prompts), noise_BCHW, self.sigmas)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, ...], batch: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from the seeds' noise, ``batch`` at a time, in main memory."""
        parts = []
        for at in range(0, len(prompts), batch):
            x_BCHW = torch.from_numpy(noise(seeds[at : at + batch], shape)).to(self.model.device)
            end = denoise(self.velocity(prompts[at : at + batch]), x_BCHW, self.sigmas)
            parts.append(self.model.decode(end).cpu())
        return torch.cat(parts)
