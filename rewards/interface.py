"""What a reward is: images and prompts in, one score an image out.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

import torch
from torch import Tensor, nn

AT_ONCE = 64  # images in one call where no gradient is wanted: the frames of a few videos are thousands


class RewardError(ValueError):
    """A reward that does not exist, cannot be loaded, or cannot be used so; the message is one sentence."""


class Reward(Protocol):
    """Scores images for their prompts; training and evaluation call the same ``score``.

    ``differentiable`` says whether the score carries a gradient down to the pixels.
    """

    @property
    def differentiable(self) -> bool:
        """True where ``score`` can be backpropagated to the images."""
        ...

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,), higher is better, of images (B, 3, H, W) in [0, 1]; prompt i belongs to image i."""
        ...


class Network(nn.Module):
    """A reward that is a frozen network: ``forward(images_BCHW, prompts)`` gives raw scores (B,).

    Images may lie on any device and have any float type: the scores come back to their device, in fp32.
    """

    differentiable = True

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """See ``Reward.score``.

        Raises:
            RewardError: images of another shape, or another number of prompts.
        """
        check_batch(images_BCHW, prompts)
        raw_B: Tensor = self(images_BCHW.to(self.device), prompts)
        return raw_B.float().to(images_BCHW.device)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def freeze(self) -> None:
        """Evaluation mode, and no gradient for the weights; the last line of a subclass's constructor."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever a trainer does to the modules that it holds."""
        super().train(False)
        return self


def check_batch(images_BCHW: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what no reward can score.

    Raises:
        RewardError: not float images (B, 3, H, W), a text for a list of prompts, or another number of prompts.
    """
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3 or not images_BCHW.is_floating_point():
        raise RewardError(
            f"images are {images_BCHW.dtype} of shape {shape}: accepted are floats (B, 3, H, W) in [0, 1]"
        )
    if isinstance(prompts, str) or len(prompts) != shape[0]:
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(f"{given} for {shape[0]} images: accepted is a list of one prompt for each image")


def scored(
    name: str,
    reward: Reward,
    images_BCHW: Tensor,
    prompts: Sequence[str],
    device: str | torch.device | None = None,
) -> Tensor:
    """``reward.score``, held to the interface: fp32 scores (B,) on the images' device. The one way to ask a reward.

    Where no gradient is wanted, at most AT_ONCE images are scored in one call, and no more than those lie on the
    reward's device: the one of its weights, else ``device``, else where the images are.

    Raises:
        RewardError: images or prompts that no reward can score; or the reward called ``name`` failed, or returned
            something else. Full memory and a failing GPU are no mistake of a reward's, and are raised as they are.
    """
    check_batch(images_BCHW, prompts)
    home = _home(reward, device or images_BCHW.device)
    num = len(images_BCHW)
    at_once = num if torch.is_grad_enabled() and images_BCHW.requires_grad else AT_ONCE
    parts = [
        _asked(name, reward, images_BCHW[at : at + at_once].to(home), prompts[at : at + at_once])
        for at in range(0, num, at_once)
    ]
    return torch.cat(parts).to(images_BCHW.device) if parts else images_BCHW.new_zeros(0, dtype=torch.float32)


def _home(reward: Reward, otherwise: str | torch.device) -> str | torch.device:
    first = next(reward.parameters(), None) if isinstance(reward, nn.Module) else None
    return otherwise if first is None else first.device


def _asked(name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    with named(f"reward {name!r} failed in score(images_BCHW, prompts)"):
        raw = reward.score(images_BCHW, prompts)
    if not isinstance(raw, Tensor) or tuple(raw.shape) != (len(images_BCHW),):
        got = f"shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
        raise RewardError(
            f"reward {name!r} returned {got} for {len(images_BCHW)} images: accepted is a tensor of one score for each"
        )
    return raw.float()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn whatever a reward's own code raises into a RewardError: ``what``, then the exception's type and message."""
    try:
        yield
    except (RewardError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"{what}: {said(error)}") from error


def said(error: BaseException) -> str:
    """An exception's type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
