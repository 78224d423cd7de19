"""Pictures to try out a reward before it is used for training or evaluation.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from training.shapes import world


def pictures(num: int, height_px: int, width_px: int) -> tuple[Tensor, list[str]]:
    """``num`` scenes of the starter world, (B, 3, H, W) in [0, 1], and their captions."""
    scenes = world.sample(num, 20261122)
    images_BCHW = world.render_NCHW(scenes)
    if (height_px, width_px) != (world.SIDE_PX, world.SIDE_PX):
        images_BCHW = F.interpolate(images_BCHW, (height_px, width_px), mode="bilinear", antialias=True).clamp(0, 1)
    return images_BCHW, scenes.captions()
