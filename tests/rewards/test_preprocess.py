"""Preprocessing against the published processors: PIL on bytes, and PIL on floats, which rounds and clips nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.interface import RewardError
from rewards.preprocess import MEAN, STD, Preprocess, square_side

ROUNDING = 1.5 / 255  # PIL rounds to bytes after each of its two passes


def image(height: int, width: int) -> np.ndarray:
    """Noise over a gradient, with hard edges: what bicubic overshoots most."""
    gen = np.random.default_rng(height * 1000 + width)
    pixels_HWC = gen.integers(0, 256, (height, width, 3))
    pixels_HWC[height // 3 : height // 2, width // 4 :] = 255
    pixels_HWC[height // 2 : 2 * height // 3, : width // 2] = 0
    return pixels_HWC.astype(np.uint8)


def tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 255


def plain(normalised_BCHW: Tensor) -> Tensor:
    return normalised_BCHW * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (300, 200), (181, 333), (224, 224)])
def test_crop_is_clips_image_processor(size: tuple[int, int]) -> None:
    pixels_HWC = image(*size)
    processor = CLIPImageProcessorPil()
    published = processor(images=Image.fromarray(pixels_HWC), return_tensors="pt").pixel_values
    ours = Preprocess(224)(tensor(pixels_HWC))
    assert ours.shape == published.shape == (1, 3, 224, 224)
    difference = (plain(ours) - plain(published)).abs()
    assert difference.max() <= ROUNDING + 1e-5
    assert difference.mean() <= 0.4 / 255


def resized_by_pil(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    planes = [Image.fromarray(pixels_HWC[..., c].astype(np.float32) / 255, mode=None) for c in range(3)]
    return torch.stack([torch.from_numpy(np.array(p.resize((width, height), Image.BICUBIC))) for p in planes])


@pytest.mark.parametrize(
    ("size", "inner", "at"),
    [
        ((64, 64), (224, 224), (0, 0)),
        ((512, 512), (224, 224), (0, 0)),
        ((300, 200), (224, 149), (0, 37)),  # 75 black columns: 37 left, 38 right
        ((181, 333), (122, 224), (51, 0)),
    ],
)
def test_pad_is_hpsv2s_resize_on_floats(size: tuple[int, int], inner: tuple[int, int], at: tuple[int, int]) -> None:
    pixels_HWC = image(*size)
    expected = torch.zeros(3, 224, 224)
    expected[:, at[0] : at[0] + inner[0], at[1] : at[1] + inner[1]] = resized_by_pil(pixels_HWC, *inner)
    assert float(expected.max()) > 1.01  # not clipped
    assert (plain(Preprocess(224, "pad")(tensor(pixels_HWC)))[0] - expected).abs().max() < 5e-5


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_gradient_is_that_of_finite_differences(fit: str) -> None:
    images = 0.3 + 0.4 * torch.rand(1, 3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(2))

    def value(x: Tensor) -> Tensor:
        return (Preprocess(6, fit)(x) * weight).sum()  # type: ignore[arg-type]

    pixels = images.float().requires_grad_()
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    change = value(images.float() + 0.05 * direction) - value(images.float() - 0.05 * direction)
    # Resizing is linear, so a difference is exact where nothing is clipped.
    assert float(change) == pytest.approx(0.1 * float((gradient * direction).sum()), rel=1e-3)


def test_any_float_type_is_computed_in_fp32() -> None:
    images = tensor(image(40, 40))
    assert torch.equal(Preprocess(28)(images.double()), Preprocess(28)(images))
    assert Preprocess(28)(images.bfloat16()).dtype == torch.float32


def test_a_tower_that_reads_no_squares_is_refused() -> None:
    assert square_side(224) == 224
    with pytest.raises(RewardError, match="the side of a square"):
        square_side((224, 448))
