"""Ways in which a picture can be badly drawn, for pairs of a clean and a degraded picture.

They imitate what generators get wrong: outlines that wobble, shapes between two shapes, colours
between two colours, objects that fade, blur, stains. Suffixes as in world.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.shapes import world
from training.shapes.world import Scenes

KINDS = ("wobble", "morph", "tint", "fade", "blur", "stain")


def smooth_noise(num: int, channels: int, cells: int, gen: torch.Generator) -> Tensor:
    """Smooth random fields (N, C, 64, 64) of about unit deviation, with ``cells`` bumps a side."""
    coarse = torch.randn(num, channels, cells, cells, generator=gen)
    return F.interpolate(coarse, size=world.SIDE_PX, mode="bicubic", align_corners=False)


def blur(x_NCHW: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur, each image with its own deviation in pixels (at most about 3)."""
    taps = torch.arange(-6, 7, dtype=torch.float32)
    kernel_NT = torch.exp(-0.5 * (taps / sigma_N[:, None].clamp(min=1e-3)) ** 2)
    kernel_NT = kernel_NT / kernel_NT.sum(1, keepdim=True)
    num, channels, height, width = x_NCHW.shape
    kernel = kernel_NT.repeat_interleave(channels, 0)
    flat = F.pad(x_NCHW, (6, 6, 6, 6), mode="replicate").reshape(1, num * channels, height + 12, width + 12)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=num * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=num * channels)
    return flat.reshape(num, channels, height, width)


def _cover(scenes: Scenes, k: int, kind_N: np.ndarray, gen: torch.Generator) -> Tensor:
    """Coverage (N, H, W) of object k, with wobbling outlines and morphed shapes where ``kind_N`` says so."""
    num = len(scenes)
    x, y, radius = (
        torch.from_numpy(column[:, k].astype(np.float32)) for column in (scenes.x_NK, scenes.y_NK, scenes.radius_NK)
    )
    shape = torch.from_numpy(scenes.shape_NK[:, k])
    distance = world.distance_NHW(shape, x, y, radius)
    morph = torch.from_numpy(kind_N == 1)
    if morph.any():
        other = (shape + torch.randint(1, 8, (num,), generator=gen)) % 8
        part = 0.3 + 0.3 * torch.rand(num, generator=gen)[morph, None, None]
        second = world.distance_NHW(other[morph], x[morph], y[morph], radius[morph])
        distance[morph] = torch.lerp(distance[morph], second, part)
    wobble = torch.from_numpy(kind_N == 0)
    if wobble.any():
        field = smooth_noise(num, 1, 16, gen)[:, 0]
        size = 0.06 + 0.18 * torch.rand(num, 1, 1, generator=gen)
        distance[wobble] += (field * size * radius[:, None, None].clamp(min=1.0))[wobble]
    return (0.5 - distance).clamp(0, 1)


def draw(scenes: Scenes, seed: int) -> tuple[Tensor, np.ndarray]:
    """Draw each scene with one defect: images (N, 3, 64, 64) in [0, 1], and which of KINDS it was."""
    num = len(scenes)
    gen = torch.Generator().manual_seed(seed)
    kind_N = torch.randint(0, len(KINDS), (num,), generator=gen).numpy()
    image = world.BACKGROUNDS_RGB[scenes.background_N][:, :, None, None].expand(-1, -1, 64, 64)
    alpha = torch.where(torch.from_numpy(kind_N == 3), 0.25 + 0.45 * torch.rand(num, generator=gen), torch.ones(num))
    # One of the two objects is badly drawn; the other one may be fine.
    victim = np.where(scenes.count_N == 2, torch.randint(0, 3, (num,), generator=gen).numpy(), 2)
    for k in range(2):
        hit = (victim == k) | (victim == 2)
        cover = _cover(scenes, k, np.where(hit, kind_N, -1), gen)
        cover = cover * torch.from_numpy(scenes.count_N > k)[:, None, None]
        cover = cover * torch.where(torch.from_numpy(hit), alpha, torch.ones(num))[:, None, None]
        ink = world.COLORS_RGB[scenes.color_NK[:, k]]
        other = world.COLORS_RGB[torch.randint(0, 8, (num,), generator=gen)]
        part = torch.where(torch.from_numpy(hit & (kind_N == 2)), 0.3 + 0.2 * torch.rand(num, generator=gen), 0.0)
        field = (0.5 + smooth_noise(num, 1, 4, gen)).clamp(0, 1) * 2
        ink_map = torch.lerp(
            ink[:, :, None, None].expand(-1, -1, 64, 64),
            other[:, :, None, None].expand(-1, -1, 64, 64),
            (part[:, None, None, None] * field).clamp(0, 0.6),
        )
        image = torch.lerp(image, ink_map, cover[:, None])
    return _spoil(image, kind_N, gen), kind_N


def _spoil(image: Tensor, kind_N: np.ndarray, gen: torch.Generator) -> Tensor:
    num = len(image)
    is_blur = torch.from_numpy(kind_N == 4)
    sigma = torch.where(is_blur, 1.3 + 1.5 * torch.rand(num, generator=gen), torch.full((num,), 0.1))
    image = blur(image, sigma)
    stain = smooth_noise(num, 3, 8, gen) * (0.03 + 0.09 * torch.rand(num, 1, 1, 1, generator=gen))
    return (image + stain * torch.from_numpy(kind_N == 5)[:, None, None, None]).clamp(0, 1)


def photograph(x_NCHW: Tensor, gen: torch.Generator) -> Tensor:
    """Slight blur, noise and shading, as an autoencoder leaves them: these must not change a preference."""
    num = len(x_NCHW)
    x_NCHW = blur(x_NCHW, 0.7 * torch.rand(num, generator=gen))
    shade = 1 + 0.08 * (2 * torch.rand(num, 1, 1, 1, generator=gen) - 1)
    grain = 0.04 * torch.rand(num, 1, 1, 1, generator=gen) * torch.randn(x_NCHW.shape, generator=gen)
    soft = 0.03 * torch.rand(num, 1, 1, 1, generator=gen) * smooth_noise(num, 3, 16, gen)
    return (x_NCHW * shade + grain + soft).clamp(0, 1)
