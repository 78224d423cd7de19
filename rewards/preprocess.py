"""Images in [0, 1] to what a published image tower reads, differentiable.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.interface import RewardError

# Of OpenAI's CLIP; every published reward here has kept them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """Antialiased bicubic resize to a square of ``size`` pixels, then normalisation.

    ``fit`` "crop": the shorter side becomes ``size`` and the middle is cut out, as CLIP's image processor does.
    That one resizes bytes, which clips what bicubic overshoots, so it is clipped here too; its rounding to
    bytes would give no gradient and is left out (less than 1.5/255 a pixel: tests/rewards/test_preprocess.py).
    ``fit`` "pad": the longer side becomes ``size`` and the rest is black, as HPSv2's ``ResizeMaxSize`` does
    on floats, where nothing is clipped.
    """

    size: int
    fit: Literal["crop", "pad"] = "crop"

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any float type -> normalised fp32 (B, 3, size, size)."""
        fitted = self._crop(images_BCHW.float()) if self.fit == "crop" else self._pad(images_BCHW.float())
        mean, std = (torch.tensor(values, device=fitted.device)[:, None, None] for values in (MEAN, STD))
        return (fitted - mean) / std

    def _crop(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[2:]
        short = min(height, width)
        shape = (int(self.size * height / short), int(self.size * width / short))
        top, left = ((side - self.size) // 2 for side in shape)
        # PIL's order: rows first, clipped, then columns. Clipped only at the end, hard edges differ by up to 19/255.
        resized = _resize(_resize(images_BCHW, (height, shape[1])).clamp(0, 1), shape).clamp(0, 1)
        return resized[:, :, top : top + self.size, left : left + self.size]

    def _pad(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[2:]
        scale = self.size / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        high, wide = (self.size - side for side in shape)
        return F.pad(_resize(images_BCHW, shape), (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def square_side(image_size: object) -> int:
    """The ``image_size`` of a published tower's configuration, in pixels.

    Raises:
        RewardError: the tower does not read squares.
    """
    if not isinstance(image_size, int):
        raise RewardError(f"the image tower reads {image_size}: accepted is one number, the side of a square")
    return image_size


def _resize(images_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(images_BCHW, shape, mode="bicubic", align_corners=False, antialias=True)
