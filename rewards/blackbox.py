"""Rewards without a gradient: any function of images and prompts, for evaluation and the gate.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards.interface import check_batch

Function = Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]]


class BlackBox:
    """A function as a reward; it gets images in main memory, and neither they nor its scores have a gradient."""

    differentiable = False

    def __init__(self, function: Function) -> None:
        self.function = function

    @torch.no_grad()
    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The function's values, as fp32 on the images' device."""
        check_batch(images_BCHW, prompts)
        values = self.function(images_BCHW.detach().cpu(), prompts)
        return torch.as_tensor(values, dtype=torch.float32, device=images_BCHW.device)
