"""Resizing by two matrices is torch's own resizing, whatever the size and the fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.preprocess import MEAN, STD, Preprocess
from student.runtimes.resize import matrices, resize

SIZES = ((64, 64), (300, 200), (181, 333), (28, 28), (17, 9))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", SIZES)
def test_two_matrices_are_torchs_interpolation(fit: str, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for side in (28, 64):
        preprocess = Preprocess(side, fit)  # type: ignore[arg-type]
        rows, columns = map(torch.from_numpy, matrices(fit, side, *size))
        assert rows.shape == (side, size[0]) and columns.shape == (size[1], side)
        assert (preprocess(images) - preprocess.resampled(images, rows, columns)).abs().max() < 2e-5


def test_a_size_that_need_not_change_is_the_identity() -> None:
    np.testing.assert_array_equal(resize(64, 64), np.eye(64))


def test_each_row_keeps_the_brightness() -> None:
    for source, target in ((9, 64), (333, 28), (64, 63)):
        np.testing.assert_allclose(resize(source, target).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (181, 333), (1024, 768), (31, 57)])
def test_in_bytes_is_pils_resize_of_bytes_byte_for_byte(size: tuple[int, int]) -> None:
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    short = min(size)
    shape = tuple(int(56 * side / short) for side in size)
    theirs = np.asarray(Image.fromarray(pixels_HWC).resize(shape[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    top, left = ((side - 56) // 2 for side in shape)
    images = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 255
    rows, columns = map(torch.from_numpy, matrices("crop", 56, *size))
    preprocess = replace(Preprocess(56), normalise=False, in_bytes=True)
    ours = preprocess.resampled(images, rows, columns)[0] * 255
    expected = theirs[:, top : top + 56, left : left + 56]
    assert np.array_equal(ours.round().numpy(), expected) and (ours - ours.round()).abs().max() < 1e-4
    assert np.array_equal((preprocess(images)[0] * 255).round().numpy(), expected)
    normalised = replace(preprocess, normalise=True).resampled(images, rows, columns)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert (normalised * std + mean - ours / 255).abs().max() < 1e-6
