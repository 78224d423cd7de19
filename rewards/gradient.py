"""What a student learns from: the gradient of a reward's scores on the pixels.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards.interface import RewardError, named

Score = Callable[[Tensor, Sequence[str]], Tensor]


def pixel_gradient(name: str, score: Score, images_BCHW: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Scores (B,) of the reward called ``name``, and the gradient of their sum on the images (B, C, H, W).

    Raises:
        RewardError: scores that have no gradient or are not finite.
    """
    with torch.enable_grad():
        pixels_BCHW = images_BCHW.detach().clone().requires_grad_()
        score_B = score(pixels_BCHW, prompts)
        total = score_B.sum()
    if not score_B.requires_grad:
        raise RewardError(f"reward {name!r} says that it is differentiable, but its scores have no gradient")
    if not bool(score_B.isfinite().all()):
        raise RewardError(f"reward {name!r} returned scores that are not finite")
    with named(f"reward {name!r} failed in the backward pass"):
        (gradient_BCHW,) = torch.autograd.grad(total, pixels_BCHW, allow_unused=True)
    return score_B.detach(), torch.zeros_like(images_BCHW) if gradient_BCHW is None else gradient_BCHW


def require_pixel_gradient(name: str, score: Score, images_BCHW: Tensor, prompts: Sequence[str]) -> None:
    """Refuse a reward that a student cannot learn from.

    Raises:
        RewardError: as ``pixel_gradient``; or a gradient that is not finite, or zero for every image.
    """
    _, gradient_BCHW = pixel_gradient(name, score, images_BCHW, prompts)
    if not bool(gradient_BCHW.isfinite().all()):
        raise RewardError(f"the gradient of reward {name!r} is not finite: no student can be trained on it")
    if not bool(gradient_BCHW.any()):
        raise RewardError(f"the gradient of reward {name!r} is zero for every picture: no student can be trained on it")
