"""Where a reward without a gradient leads: several ends of one sample, drawn from noise that differs a little, each
weighted by its signed advantage (after Self-OPD, arXiv 2608.26872, and REST, arXiv 2608.09226).

Legend: N branches, B samples, D everything else of a latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def branched(
    x_BD: Tensor, v_BD: Tensor, sigma: float, num: int, angle: float, generator: torch.Generator
) -> list[Tensor]:
    """States like ``x`` at ``sigma``, with its data and with its noise turned by ``angle`` (radians) to fresh noise."""
    data_BD, noise_BD = x_BD - sigma * v_BD, x_BD + (1 - sigma) * v_BD
    fresh = [torch.randn(x_BD.shape, generator=generator).to(x_BD.device) for _ in range(num)]
    turned = [math.cos(angle) * noise_BD + math.sin(angle) * more_BD for more_BD in fresh]
    return [(1 - sigma) * data_BD + sigma * one_BD for one_BD in turned]


def signed_direction(ends_NBD: Tensor, reward_NB: Tensor) -> Tensor:
    """The branches' ends by their signed advantages, (B, D): towards the better ones, and away from the worse.

    An advantage is how far a reward is above its sample's mean, in its deviations among the branches. For a reward that
    is linear in the ends the direction is their covariance times its gradient, over the reward's deviation; for one
    that cannot tell them apart it is zero.
    """
    above_NB, std_B = reward_NB - reward_NB.mean(0), reward_NB.std(0, correction=0)
    advantage_NB = torch.where(std_B > 0, above_NB / std_B.clamp(min=torch.finfo(std_B.dtype).tiny), 0)
    return (advantage_NB.view(*advantage_NB.shape, *[1] * (ends_NBD.ndim - 2)) * ends_NBD).mean(0)
