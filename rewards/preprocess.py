"""Converts images in [0, 1] to the input of a published image tower, differentiably.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.interface import RewardError, sent

Fit = Literal["crop", "pad", "stretch"]
# PIL's weights are multiples of 2^-22, and so are its sums, in which halves go up whatever a kernel's last bit says.
HALF = 0.5 + 2**-24
# Of OpenAI's CLIP; every published reward here has kept them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """Antialiased bicubic resize to a square of ``size`` pixels, then (``normalise``) CLIP's normalisation.

    ``fit`` "crop": the shorter side becomes ``size`` and the centre is cropped, as CLIP's image processor does. That
    processor resizes bytes, which clips bicubic overshoot, so it is clipped here too; its rounding to bytes would have
    no gradient and is omitted (less than 1.5/255 per pixel: tests/rewards/test_preprocess.py) unless ``in_bytes`` is
    set, as in serving: then it is PIL's resize, byte for byte.
    ``fit`` "pad": the longer side becomes ``size`` and the rest is black, as HPSv2's ``ResizeMaxSize`` does
    on floats, where nothing is clipped. ``fit`` "stretch": each side becomes ``size``.
    """

    size: int
    fit: Fit = "crop"
    normalise: bool = True
    in_bytes: bool = False

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any float type -> fp32 (B, 3, size, size)."""
        fit = {"crop": self._crop, "pad": self._pad, "stretch": self._stretch}[self.fit]
        return self._normalised(fit(images_BCHW.float()))

    def resized(self, images_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        """The same to any (height, width), for towers that read pictures of more than one form."""
        return self._normalised(self._resized(images_BCHW.float(), shape))

    def resampled(self, images_BCHW: Tensor, rows_SH: Tensor, columns_WS: Tensor) -> Tensor:
        """The same as two matrix products, which every runtime computes alike; the matrices include crop and padding.

        They are computed in the matrices' type: in float64 no runtime's last bit decides which byte is the nearest.
        """
        images_BCHW = images_BCHW.to(columns_WS.dtype)
        if not self._rounds:
            return self._normalised(self._clipped(rows_SH @ self._clipped(images_BCHW @ columns_WS)).float())
        bytes_BCHW = _to_bytes(rows_SH @ _to_bytes(torch.round(images_BCHW * 255) @ columns_WS))
        return self._normalised((bytes_BCHW / 255).float())

    @property
    def _rounds(self) -> bool:
        return self.in_bytes and self.fit != "pad"

    def _normalised(self, fitted_BCHW: Tensor) -> Tensor:
        if not self.normalise:
            return fitted_BCHW
        mean, std = (sent(torch.tensor(values), fitted_BCHW.device)[:, None, None] for values in (MEAN, STD))
        return (fitted_BCHW - mean) / std

    def _clipped(self, x_BCHW: Tensor) -> Tensor:
        """What PIL does to bytes after each of its two passes; floats ("pad") stay as they are."""
        if self.fit == "pad":
            return x_BCHW
        return x_BCHW.clamp(0, 1)

    def _crop(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[2:]
        short = min(height, width)
        shape = (int(self.size * height / short), int(self.size * width / short))
        top, left = ((side - self.size) // 2 for side in shape)
        resized = self._resized(images_BCHW, shape)
        return resized[:, :, top : top + self.size, left : left + self.size]

    def _stretch(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.shape[2:] == (self.size, self.size):
            return images_BCHW
        return self._resized(images_BCHW, (self.size, self.size))

    def _resized(self, images_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
        """In PIL's order: rows first, clipped, then columns; clipped once, hard edges differ by up to 19/255."""
        if self._rounds:
            return _resized_by_pil(images_BCHW, shape)
        between = (images_BCHW.shape[2], shape[1])
        return self._clipped(_resize(self._clipped(_resize(images_BCHW, between)), shape))

    def _pad(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[2:]
        scale = self.size / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        pad_h, pad_w = (self.size - side for side in shape)
        return F.pad(_resize(images_BCHW, shape), (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))


def square_side(image_size: object) -> int:
    """The ``image_size`` of a published tower's configuration, in pixels.

    Raises:
        RewardError: the tower does not read square images.
    """
    if not isinstance(image_size, int):
        raise RewardError(f"the image tower reads size {image_size}: accepted is one number, the side of a square")
    return image_size


def _to_bytes(x_BCHW: Tensor) -> Tensor:
    return torch.floor(x_BCHW + HALF).clamp(0, 255)


def _resized_by_pil(images_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
    """As the published processors do it, picture by picture in main memory: there is no gradient to be had of bytes."""
    pixels_BHWC = (images_BCHW.detach() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    resized = [np.asarray(Image.fromarray(one).resize(shape[::-1], Image.Resampling.BICUBIC)) for one in pixels_BHWC]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images_BCHW.device) / 255


def _resize(images_BCHW: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(images_BCHW, shape, mode="bicubic", align_corners=False, antialias=True)
