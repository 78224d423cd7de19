"""Several rewards as one scalar, black boxes, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rewards.blackbox import BlackBox
from rewards.interface import RewardError
from rewards.weighted import Calibration, Term, Weighted, require_gradient
from tests.rewards.own import jpeg_bytes


class Channel:
    """Mean of one channel: its gradient is known."""

    differentiable = True

    def __init__(self, channel: int) -> None:
        self.channel = channel

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_BCHW[:, self.channel].mean((1, 2))


def images(num: int = 5) -> Tensor:
    return torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(6))


def prompts(num: int = 5) -> list[str]:
    return [f"prompt {i}" for i in range(num)]


def test_the_weighted_sum_is_of_standardised_scores() -> None:
    both = Weighted(
        (Term("red", Channel(0), 2.0, Calibration(0.5, 0.1)), Term("blue", Channel(2), -0.5, Calibration(0.2, 4.0)))
    )
    red, blue = images()[:, 0].mean((1, 2)), images()[:, 2].mean((1, 2))
    expected = 2.0 * (red - 0.5) / 0.1 - 0.5 * (blue - 0.2) / 4.0
    assert torch.allclose(both.score(images(), prompts()), expected)
    raw = {"red": red.tolist(), "blue": blue.tolist()}
    assert both.of_raw(raw) == pytest.approx(expected.tolist(), abs=1e-5)
    pixels = images().requires_grad_()
    (gradient,) = torch.autograd.grad(both.score(pixels, prompts()).sum(), pixels)
    assert torch.allclose(gradient[:, 0], torch.tensor(2.0 / 0.1 / 16))
    assert torch.allclose(gradient[:, 2], torch.tensor(-0.5 / 4.0 / 16))
    assert not gradient[:, 1].any()


def test_on_its_own_calibration_images_a_reward_has_mean_0_and_deviation_1() -> None:
    red = Weighted((Term("red", Channel(0)),))
    raw = {"red": red.terms[0].raw(images(11), prompts(11)).tolist()}
    values = red.calibrated(raw).score(images(11), prompts(11))
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(values.std()) == pytest.approx(1, abs=1e-5)


def test_a_reward_that_a_run_calls_otherwise_has_its_scores_by_the_runs_name_and_its_faults_by_the_users() -> None:
    both = Weighted((Term("trained", Channel(0), asked="mine:Red"), Term("selecting", Channel(0), asked="mine:Red")))
    found = both.calibrated({"trained": [1.0, 3.0], "selecting": [5.0, 5.5]}).terms
    assert [term.calibration for term in found] == [Calibration(2.0, 2**0.5), Calibration(5.25, 0.125**0.5)]
    with pytest.raises(RewardError, match="reward 'mine:Red' cannot be standardised"):
        both.calibrated({"trained": [1.0, 1.0], "selecting": [5.0, 5.5]})


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ([1.0] * 4, "all 4 images the same score"),
        ([1.0, float("nan")], "not all scores of 2 images are finite"),
        ([1.0, float("inf")], "not all scores of 2 images are finite"),
        ([1.0], "1 calibration prompts"),
    ],
)
def test_what_cannot_be_standardised_is_refused(raw: list[float], sentence: str) -> None:
    assert Calibration.of("x", [1.0, 3.0]) == Calibration(2.0, 2**0.5)
    with pytest.raises(RewardError, match=f"reward 'x'.*{sentence}|{sentence}.*reward 'x'"):
        Calibration.of("x", raw)


def test_a_calibration_without_spread_and_a_sum_of_nothing_are_refused() -> None:
    with pytest.raises(RewardError, match="std above 0"):
        Calibration(0.0, 0.0)
    with pytest.raises(RewardError, match="one or more"):
        Weighted(())
    term = Term("red", Channel(0), 1.0, Calibration(0.5, 0.1))
    with pytest.raises(RewardError, match="red, red: accepted is each name once"):
        Weighted((term, term))


def test_a_black_box_is_given_the_images_and_its_values_are_the_scores() -> None:
    flat, noise = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    sizes = BlackBox(jpeg_bytes).score(torch.cat([flat, noise]), ["", ""])
    assert sizes.dtype == torch.float32 and 300 < sizes[0] < 1000 and sizes[1] > 2 * sizes[0]


def test_a_black_box_measures_and_gates_but_is_refused_for_the_reward_term() -> None:
    jpeg = BlackBox(jpeg_bytes)
    pixels = images().requires_grad_()
    assert not jpeg.score(pixels, prompts()).requires_grad
    weight = torch.ones(5, requires_grad=True)
    assert not BlackBox(lambda images, prompts: weight * images.mean((1, 2, 3))).score(pixels, prompts()).requires_grad
    scale = Calibration.of("jpeg", jpeg.score(images(), prompts()).tolist())
    mixed = Weighted((Term("red", Channel(0), 1.0, Calibration(0.5, 0.1)), Term("jpeg", jpeg, 0.5, scale)))
    assert not mixed.differentiable
    assert torch.isfinite(mixed.score(images(), prompts())).all()
    require_gradient("red", Channel(0))
    for name, reward in (("jpeg", jpeg), ("mixed", mixed)):
        with pytest.raises(RewardError, match="reward 'jpeg' has no gradient down to the pixels.*or for the gate"):
            require_gradient(name, reward)


class Wrong(Channel):
    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_BCHW.mean()


@pytest.mark.parametrize(
    ("given", "texts", "sentence"),
    [
        (torch.zeros(3, 4, 4), ["a"], "accepted are floats"),
        (torch.zeros(1, 1, 4, 4), ["a"], "accepted are floats"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["a"], "accepted are floats"),
        (torch.zeros(2, 3, 4, 4), ["a"], "1 prompts for 2 images"),
        (torch.zeros(2, 3, 4, 4), "ab", "one string for 2 images"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(given: Tensor, texts: Sequence[str], sentence: str) -> None:
    reward = Weighted((Term("red", Channel(0), 1.0, Calibration(0.5, 0.1)),))
    with pytest.raises(RewardError, match=sentence):
        reward.score(given, texts)


def test_a_reward_that_returns_another_shape_is_named() -> None:
    with pytest.raises(RewardError, match=r"reward 'wrong' returned shape \(\)"):
        Weighted((Term("wrong", Wrong(0), 1.0, Calibration(0.0, 1.0)),)).score(images(), prompts())
