"""The interface of a reward: images and prompts in, one score per image out.

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
    """A reward that does not exist, cannot be loaded, or cannot be used in this way; the message is one sentence."""


class Reward(Protocol):
    """Scores images for their prompts; training and evaluation call the same ``score``.

    ``differentiable`` says whether the score has a gradient down to the pixels.
    """

    @property
    def differentiable(self) -> bool:
        """True where ``score`` can be backpropagated to the images."""
        ...

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,), higher is better, of images (B, 3, H, W) in [0, 1]; prompt i belongs to image i."""
        ...


class Network(nn.Module):
    """A reward that is a frozen network: ``forward(images_BCHW, prompts)`` returns raw scores (B,).

    Images may be on any device and of any float type: the scores are returned on their device, in fp32.
    """

    differentiable = True

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """See ``Reward.score``.

        Raises:
            RewardError: images of the wrong shape, or the wrong number of prompts.
        """
        check_batch(images_BCHW, prompts)
        raw_B: Tensor = self(images_BCHW.to(self.device), prompts)
        return raw_B.float().to(images_BCHW.device)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def freeze(self) -> None:
        """Set evaluation mode, and no gradient for the weights; the last line of a subclass's constructor."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the network stays in evaluation mode, whatever a trainer does to its modules."""
        super().train(False)
        return self


def check_batch(images_BCHW: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what no reward can score.

    Raises:
        RewardError: not float images (B, 3, H, W), a string in place of a list of prompts, or the wrong number of
            prompts.
    """
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3 or not images_BCHW.is_floating_point():
        raise RewardError(
            f"images are {images_BCHW.dtype} of shape {shape}: accepted are floats (B, 3, H, W) in [0, 1]"
        )
    if isinstance(prompts, str) or len(prompts) != shape[0]:
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(f"{given} for {shape[0]} images: accepted is a list with one prompt for each image")


def scored(
    name: str,
    reward: Reward,
    images_BCHW: Tensor,
    prompts: Sequence[str],
    device: str | torch.device | None = None,
) -> Tensor:
    """``reward.score`` with its interface checked: fp32 scores (B,) on the images' device. All calls go through this.

    Where no gradient is needed, at most AT_ONCE images are scored in one call, and only those are on the reward's
    device at a time: the device of its weights, else ``device``, else that of the images.

    Raises:
        RewardError: images or prompts that no reward can score; or the reward called ``name`` failed or returned
            something else. Running out of memory and a failing GPU are not a reward's fault and are raised unchanged.
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


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; from main memory to a GPU through pinned memory, so that the host does not wait for it."""
    from_here = value.device.type == "cpu"
    if from_here and torch.device(device).type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=from_here)


def _home(reward: Reward, otherwise: str | torch.device) -> str | torch.device:
    first = next(reward.parameters(), None) if isinstance(reward, nn.Module) else None
    return otherwise if first is None else first.device


def _asked(name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    with named(f"reward {name!r} failed in score(images_BCHW, prompts)"):
        raw = reward.score(images_BCHW, prompts)
    if not isinstance(raw, Tensor) or tuple(raw.shape) != (len(images_BCHW),):
        got = f"shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
        raise RewardError(
            f"reward {name!r} returned {got} for {len(images_BCHW)} images: accepted is a tensor with one score each"
        )
    return raw.float()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn any exception of a reward's own code into a RewardError: ``what``, then its type and message."""
    try:
        yield
    except (RewardError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"{what}: {said(error)}") from error


def said(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
