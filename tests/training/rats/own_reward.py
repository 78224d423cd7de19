"""A user's own rewards, as they would write them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Redness:
    """How much redder than green the pictures are."""

    differentiable = True

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images_BCHW[:, 0] - images_BCHW[:, 1]).mean((1, 2))


class Brightness:
    """The mean of all values."""

    differentiable = True

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_BCHW.mean((1, 2, 3))


class Counted:
    """No gradient: whole numbers."""

    differentiable = False

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images_BCHW > 0.5).float().mean((1, 2, 3)).mul(1000).round()


class Broken(Redness):
    """Not a number from the first picture on that has a gradient."""

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        value = super().score(images_BCHW, prompts)
        return value * float("nan") if images_BCHW.requires_grad else value
