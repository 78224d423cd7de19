"""Sampling from a model in training: the same loop as in serving, with or without guidance.

Legend: B images, C channels, H/W latent cells or pixels; a video has one more axis, of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from student.base import NETWORKS
from student.families.family import Condition, Family, sent
from student.families.two_experts import called_at
from student.noise import noise
from student.sampler import denoise
from training.rats.trajectory import Trajectory, rollout

Velocity = Callable[[Tensor, float], Tensor]


def velocity_of(model: Family, condition: Condition, empty: Condition | None = None, guidance: float = 1.0) -> Velocity:
    """The velocity field for one batch of prompts.

    With a guidance w other than 1 as the family's pipeline applies it: v_empty + w (v_prompt - v_empty) or its variant.
    Both velocities come from one call on twice the batch.
    """

    def plain(x: Tensor, sigma: float) -> Tensor:
        return model.velocity(x, sigma, condition).float()

    if guidance == 1.0:
        return plain
    assert empty is not None
    both = Condition.stack([empty, condition])

    def guided(x: Tensor, sigma: float) -> Tensor:
        without, v = model.velocity(torch.cat([x, x]), sigma, both).float().chunk(2)
        return model.guided(v, without, _guidance_at(model, sigma, guidance))

    return guided


def _guidance_at(model: Family, sigma: float, guidance: float) -> float:
    """That of the expert which a sigma belongs to: a family of two may have a second one (``guidance_2``)."""
    second: Any = getattr(model, "guidance_2", 0.0)
    if second and called_at([sigma], model.transformer.boundary) == NETWORKS[1:]:
        return float(second)
    return guidance


def precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a run ("bf16" by autocast, or "fp32"), the same in training and evaluation."""
    stack = ExitStack()
    if device.type == "meta":  # there is no autocast for it
        return stack
    stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"))
    if device.type == "cpu":
        # Flash attention's backward is 1.8 times slower than the plain form on a CPU at 32 tokens.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def takes_guidance(model: Family) -> bool:
    """Whether the transformer takes guidance as an input (FLUX.1-dev); then no second velocity is computed."""
    return getattr(model, "guidance", None) is not None


@dataclass(frozen=True)
class Sampler:
    """A model, the sigmas of its steps, its guidance and negative prompt, and the precision in which it computes.

    A model that takes guidance as an input has its own (``Family.guidance``), and ``guidance`` is not applied again.
    """

    model: Family
    sigmas: tuple[float, ...]
    guidance: float = 1.0
    negative: str = ""
    precision: str = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which samples are generated and measured."""
        return precision(self.precision, self.model.device)

    def velocity(self, prompts: Sequence[str]) -> Velocity:
        """The velocity field for these prompts."""
        condition = self.model.encode(prompts)
        if self.guidance == 1.0 or takes_guidance(self.model):
            return velocity_of(self.model, condition)
        return velocity_of(self.model, condition, self.model.encode([self.negative] * len(prompts)), self.guidance)

    @torch.no_grad()
    def trajectory(self, noise_BCHW: Tensor, prompts: Sequence[str]) -> Trajectory:
        """All states from the given noise to the data, without gradient."""
        with self.autocast():
            return rollout(self.velocity(prompts), noise_BCHW, self.sigmas)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, ...], batch: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from the seeds' noise, ``batch`` at a time, in main memory."""
        parts = []
        for at in range(0, len(prompts), batch):
            x_BCHW = sent(torch.from_numpy(noise(seeds[at : at + batch], shape)), self.model.device)
            with self.autocast():
                end = denoise(self.velocity(prompts[at : at + batch]), x_BCHW, self.sigmas)
                parts.append(self.model.decode(end).float().cpu())
        return torch.cat(parts)
