"""A user's own rewards, as README.md shows them."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
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


class NaN(Redness):
    """A class may be called so."""


class Column(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts)[:, None]


class MeanOfAll(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean()


class Listed(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:  # type: ignore[override]
        return [0.0] * len(images)


class Raising(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("no such prompt\nsecond line")


class Full(Redness):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


class WithLabels(Redness):
    """Asks for more than it is given."""

    def score(self, images: Tensor, prompts: Sequence[str], labels: Tensor) -> Tensor:
        return super().score(images, prompts)


class WithoutPrompts(Redness):
    def score(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return images.mean((1, 2, 3))


class Unmakeable(Redness):
    def __init__(self) -> None:
        raise FileNotFoundError("weights.pt")


class Torn(Redness):
    """Its scores are fine, and their gradient cannot be taken."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scale = (images * 2).exp()
        score = (scale * scale).mean((1, 2, 3))
        scale += 1
        return score


def one_for_all(images: Tensor, prompts: Sequence[str]) -> list[float]:
    return [1.0]


def without_prompts(images: Tensor) -> list[float]:
    return [1.0] * len(images)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


class _Callable:
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return [2.0] * len(images)


TWO = _Callable()
REDNESS = Redness()


def jpeg_bytes(images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
    """The size of each image as a JPEG of quality 95, in bytes: a measure of its detail."""
    bytes_BHWC = (images_BCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for pixels_HWC in bytes_BHWC:
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG", quality=95)
        sizes.append(float(file.tell()))
    return sizes
