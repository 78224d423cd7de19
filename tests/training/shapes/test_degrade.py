"""Each defect of a picture by what it does: to which pixels, how strongly, and to which of two objects."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from training.shapes import degrade, world

NUM = 2400
WOBBLE, MORPH, TINT, FADE, BLUR, STAIN = range(6)


@pytest.fixture(scope="module")
def scenes() -> world.Scenes:
    return world.sample(NUM, 41)


@pytest.fixture(scope="module")
def drawn(scenes: world.Scenes) -> tuple[Tensor, np.ndarray]:
    return degrade.draw(scenes, 42)


@pytest.fixture(scope="module")
def cover(scenes: world.Scenes) -> Tensor:
    return world.coverage_NKHW(scenes)


def ground(scenes: world.Scenes, i: int) -> Tensor:
    return world.BACKGROUNDS_RGB[scenes.background_N[i]]


def ink(scenes: world.Scenes, i: int, k: int = 0) -> Tensor:
    return world.COLORS_RGB[scenes.color_NK[i, k]]


def share_of(pixel: Tensor, low: Tensor, high: Tensor) -> tuple[float, float]:
    """Where a colour lies between two others, and how far from the line between them."""
    step = high - low
    share = float((pixel - low) @ step / (step @ step))
    return share, float((pixel - low - share * step).norm())


def found(scenes: world.Scenes, kinds: np.ndarray, kind: int, count: int = 1) -> list[int]:
    return [int(i) for i in np.flatnonzero((kinds == kind) & (scenes.count_N == count))]


def test_every_defect_is_as_frequent_as_the_others(drawn: tuple[Tensor, np.ndarray]) -> None:
    assert degrade.KINDS == ("wobble", "morph", "tint", "fade", "blur", "stain")
    np.testing.assert_allclose(np.bincount(drawn[1], minlength=6) / NUM, 1 / 6, atol=0.03)
    assert drawn[0].shape == (NUM, 3, 64, 64) and drawn[0].dtype == torch.float32


def test_a_faded_object_keeps_a_quarter_to_seven_tenths_of_its_ink(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray], cover: Tensor
) -> None:
    alphas = []
    for i in found(scenes, drawn[1], FADE):
        pixels = drawn[0][i][:, cover[i, 0] == 1]
        assert torch.allclose(pixels, pixels[:, :1].expand_as(pixels), atol=1e-5)
        alpha, apart = share_of(pixels[:, 0], ground(scenes, i), ink(scenes, i))
        assert apart < 1e-5
        alphas.append(alpha)
    assert 0.25 <= min(alphas) < 0.27 and 0.68 < max(alphas) <= 0.7


def test_of_two_objects_either_or_both_are_badly_drawn(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray], cover: Tensor
) -> None:
    hits = []
    for i in found(scenes, drawn[1], FADE, 2):
        shares = [
            share_of(drawn[0][i][:, cover[i, k] == 1].mean(1), ground(scenes, i), ink(scenes, i, k))[0] for k in (0, 1)
        ]
        hits.append(tuple(share < 0.71 for share in shares))
    parts = {which: hits.count(which) / len(hits) for which in ((True, False), (False, True), (True, True))}
    assert parts == pytest.approx(dict.fromkeys(parts, 1 / 3), abs=0.09) and (False, False) not in hits


def test_a_tinted_object_lies_between_its_ink_and_another_colour_in_smooth_patches(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray], cover: Tensor
) -> None:
    most, means, even = [], [], 0
    for i in found(scenes, drawn[1], TINT)[:60]:
        inside, outside = cover[i, 0] == 1, cover[i].amax(0) == 0
        pixels = drawn[0][i][:, inside]
        assert torch.allclose(drawn[0][i][:, outside], ground(scenes, i)[:, None], atol=1e-5)
        others = [c for c in range(8) if c != scenes.color_NK[i, 0]]
        step = {c: world.COLORS_RGB[c] - ink(scenes, i) for c in others}
        best = min(
            others,
            key=lambda c: float(
                (pixels - ink(scenes, i)[:, None] - step[c][:, None] * _shares(pixels, ink(scenes, i), step[c])).norm()
            ),
        )
        shares = _shares(pixels, ink(scenes, i), step[best])
        if float(shares.max()) < 1e-4:
            even += 1  # its own colour was drawn again, or the patch lies elsewhere
            continue
        assert (pixels - ink(scenes, i)[:, None] - step[best][:, None] * shares).abs().max() < 1e-4
        assert shares.min() > -1e-4 and shares.max() <= 0.6 + 1e-4
        most.append(float(shares.max()))
        means.append(float(shares.mean()))
    assert even < 20 and max(most) > 0.59 and np.median(most) > 0.5
    assert np.mean(means) == pytest.approx(0.31, abs=0.03), "of the way to the other colour, on average"


def _shares(pixels_CP: Tensor, low_C: Tensor, step_C: Tensor) -> Tensor:
    return (pixels_CP - low_C[:, None]).T @ step_C / (step_C @ step_C)


def test_a_morphed_object_lies_between_its_shape_and_another(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray]
) -> None:
    parts = []
    for i in found(scenes, drawn[1], MORPH)[:25]:
        at = [torch.tensor(column[i : i + 1, 0], dtype=torch.float32) for column in (scenes.x_NK, scenes.y_NK)]
        radius = torch.tensor(scenes.radius_NK[i : i + 1, 0], dtype=torch.float32)
        distances = [world.distance_NHW(torch.tensor([kind]), *at, radius)[0] for kind in range(8)]
        own = int(scenes.shape_NK[i, 0])
        errors = {}
        for kind, part in itertools.product((k for k in range(8) if k != own), np.linspace(0.25, 0.65, 41)):
            seen = (0.5 - torch.lerp(distances[own], distances[kind], float(part))).clamp(0, 1)
            image = torch.lerp(ground(scenes, i)[:, None, None], ink(scenes, i)[:, None, None], seen)
            errors[kind, float(part)] = float((image - drawn[0][i]).abs().max())
        (_, part), error = min(errors.items(), key=lambda one: one[1])
        assert error < 0.12, "a hundredth of a step in shares moves a rim by less than a tenth of a pixel"
        parts.append(part)
    assert 0.29 <= min(parts) < 0.36 and 0.54 < max(parts) <= 0.61


def test_a_wobbling_outline_moves_with_the_size_of_the_object_and_nothing_else_does(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray], cover: Tensor
) -> None:
    moved = []
    for i in found(scenes, drawn[1], WOBBLE):
        step = ink(scenes, i) - ground(scenes, i)
        seen = ((drawn[0][i] - ground(scenes, i)[:, None, None]) * step[:, None, None]).sum(0) / (step @ step)
        image = ground(scenes, i)[:, None, None] + step[:, None, None] * seen
        assert (image - drawn[0][i]).abs().max() < 1e-5, "no other colour"
        moved.append(float((seen - cover[i, 0]).abs().sum() / cover[i, 0].sum()))
    assert min(moved) > 0.01 and np.mean(moved) == pytest.approx(WOBBLED, rel=0.08)


WOBBLED = 0.31  # of an object's area, as measured: outlines move by up to a quarter of a radius


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_blur_is_a_gaussian_of_its_own_width_for_each_picture(sigma: float) -> None:
    at = np.arange(-6, 7)
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    weights /= weights.sum()
    points = torch.zeros(2, 3, 64, 64)
    points[:, 1, 30, 20] = 1
    found = degrade.blur(points, torch.tensor([sigma, 0.0]))
    np.testing.assert_allclose(found[0, 1, 24:37, 14:27].numpy(), np.outer(weights, weights), atol=1e-6)
    assert torch.allclose(found[1], points[1], atol=1e-6) and not found[0, 0].any()


def test_a_blurred_picture_is_blurred_by_one_to_three_pixels(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray]
) -> None:
    clean, widths = world.render_NCHW(scenes), []
    grid = torch.linspace(1.2, 2.9, 35)
    for i in found(scenes, drawn[1], BLUR, 2)[:60]:
        tried = degrade.blur(clean[i].expand(len(grid), -1, -1, -1), grid)
        errors = (tried - drawn[0][i]).abs().flatten(1).amax(1)
        assert errors.min() < 0.03
        widths.append(float(grid[errors.argmin()]))
    assert 1.3 <= min(widths) < 1.45 and 2.65 < max(widths) <= 2.8


def test_a_stained_picture_has_smooth_patches_of_other_colours(
    scenes: world.Scenes, drawn: tuple[Tensor, np.ndarray]
) -> None:
    clean, strengths = world.render_NCHW(scenes), []
    for i in found(scenes, drawn[1], STAIN, 2)[:120]:
        stain = drawn[0][i] - clean[i]
        free = (drawn[0][i] > 0.001) & (drawn[0][i] < 0.999)
        strengths.append(float(stain[free].std()))
        beside = (stain[:, 1:] - stain[:, :-1])[free[:, 1:] & free[:, :-1]]
        assert float(beside.std()) < 0.35 * strengths[-1], "eight patches a side"
        red, green, blue = stain.flatten(1)
        assert float(torch.corrcoef(torch.stack([red, green, blue]))[0, 1].abs()) < 0.6
    unit = float(degrade.smooth_noise(400, 3, 8, torch.Generator().manual_seed(1)).std())
    assert 0.6 < unit < 1.1
    assert 0.02 * unit < min(strengths) and max(strengths) < 0.15 * unit
    assert np.mean(strengths) == pytest.approx(0.075 * unit, rel=0.12)


def test_a_photograph_is_shaded_grainy_and_soft_by_amounts_that_change_no_preference() -> None:
    """Of even gray: up to 8 % of shading, grain of up to 4 hundredths, and smooth noise of up to 3."""
    gray = torch.full((600, 3, 64, 64), 0.5)
    found = degrade.photograph(gray, torch.Generator().manual_seed(3))
    shade = 2 * found.mean((1, 2, 3)) - 1
    assert -0.09 < shade.min() < -0.07 and 0.07 < shade.max() < 0.09 and shade.mean().abs() < 0.01
    second = found[..., 2:] - 2 * found[..., 1:-1] + found[..., :-2]  # of which smooth noise has next to nothing
    grain = second.flatten(1).std(1) / 6**0.5
    assert (
        grain.min() < 0.003 and 0.036 < grain.max() < 0.042 and float(grain.mean()) == pytest.approx(0.021, abs=0.002)
    )
    means = torch.nn.functional.avg_pool2d(found, 4)
    soft = (means.flatten(2).var(2).mean(1) - grain**2 / 16).clamp(min=0).sqrt()
    unit = float(degrade.smooth_noise(200, 3, 16, torch.Generator().manual_seed(1)).std())
    assert 0.02 * unit < soft.max() < 0.03 * unit and float(soft.mean()) == pytest.approx(0.013 * unit, abs=0.003)
    point = torch.zeros(300, 3, 64, 64)
    point[..., 32, 32] = 1.0
    sharp = degrade.photograph(point, torch.Generator().manual_seed(4))[..., 32, 32].mean(1)
    assert 0.25 < sharp.min() < 0.45 and sharp.max() > 0.9, "blurred by up to 0.7 pixels"
