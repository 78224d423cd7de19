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
    """A number when it is tried out, and none from the first step on."""

    def __init__(self) -> None:
        self.learned = 0

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        value = super().score(images_BCHW, prompts)
        self.learned += images_BCHW.requires_grad
        return value * float("nan") if images_BCHW.requires_grad and self.learned > 1 else value
