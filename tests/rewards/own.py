"""A user's own rewards, as README.md shows them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Redness:
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts], device=images.device)
        return wanted * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


class Learned(nn.Module):
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.read(images.mean((2, 3)).to(self.read.weight.dtype))[:, 0]


class _Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return -gradient


class Backwards(Redness):
    """A gradient of the wrong sign."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _Backwards.apply(super().score(images, prompts))


class Blind(Redness):
    """Says that it is differentiable, and is not."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images.detach(), prompts)


class Flat(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 0 * super().score(images, prompts)


class Infinite(Redness):
    """Finite, with an infinite slope: the square root at 0."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images - images.detach()).sum((1, 2, 3)).sqrt()


class NotANumber(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts) * float("nan")


class Silent:
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Scoreless:
    differentiable = True


class Wanting(Redness):
    def __init__(self, path: str) -> None:
        self.path = path


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


class _Callable:
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return [2.0] * len(images)


TWO = _Callable()
REDNESS = Redness()
