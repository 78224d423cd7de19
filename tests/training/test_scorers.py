"""Several rewards as one scalar of a role: from kept raw scores and from pictures, against the formula by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from rewards.weighted import Calibration, Term, Weighted
from training.scorers import _source, all_terms, calibrated


def _red(images: Tensor, prompts: object) -> Tensor:
    return images[:, 0].mean((1, 2))


def _bright(images: Tensor, prompts: object) -> Tensor:
    return images.mean((1, 2, 3))


class Own:
    """A function as a reward with a gradient."""

    differentiable = True

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        self.score = function


REWARDS = {
    "trained": Weighted(
        (
            Term("trained-1", Own(_red), 1.0, Calibration(0.2, 0.1)),
            Term("trained-2", Own(_bright), -0.5, Calibration(0.5, 0.25)),
        )
    ),
    "heldout": Weighted((Term("heldout", Own(_bright), 1.0, Calibration(0.0, 2.0)),)),
}


def test_a_role_is_the_weighted_sum_of_its_standardised_rewards() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    red, bright = _red(images, None), _bright(images, None)
    expected = (red - 0.2) / 0.1 - 0.5 * (bright - 0.5) / 0.25
    torch.testing.assert_close(REWARDS["trained"].score(images, ["a"] * 3), expected)
    torch.testing.assert_close(REWARDS["heldout"].score(images, ["a"] * 3), bright / 2)
    raw = {"trained-1": red.tolist(), "trained-2": bright.tolist(), "heldout": bright.tolist()}
    assert REWARDS["trained"].of_raw(raw) == pytest.approx(expected.tolist(), abs=1e-5)


def test_rewards_are_calibrated_on_their_own_column() -> None:
    raw = {"trained-1": [1.0, 3.0], "trained-2": [2.0, 6.0], "heldout": [0.0, 1.0]}
    found = calibrated(REWARDS, raw)
    kept = {term.name: term.calibration for term in all_terms(found)}
    assert kept["trained-1"] == Calibration(2.0, 2**0.5) and kept["trained-2"] == Calibration(4.0, 8**0.5)
    assert kept["heldout"] == Calibration(0.5, 0.5**0.5)
    assert found["trained"].of_raw(raw) == pytest.approx([-(0.5**0.5) * 0.5, 0.5**0.5 * 0.5])


def test_figures_of_a_published_reward_belong_to_its_weights() -> None:
    network = nn.Linear(2, 1)
    before = _source("clip", network)  # type: ignore[arg-type]
    assert _source("clip", network) == before  # type: ignore[arg-type]
    with torch.no_grad():
        network.bias += 1
    assert _source("clip", network) != before  # type: ignore[arg-type]
    assert _source("pickscore", network) != _source("clip", network)  # type: ignore[arg-type]


def test_a_videos_score_is_the_mean_of_its_frames_for_its_own_prompt() -> None:
    video = torch.rand(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    seen: list[str] = []

    def numbered(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.extend(prompts)
        return 100 * torch.tensor([float(prompt) for prompt in prompts]) + images.mean((1, 2, 3))

    expected = torch.tensor([300.0, 700.0]) + video.mean((1, 2, 3, 4))
    torch.testing.assert_close(Term("numbered", Own(numbered)).raw(video, ["3", "7"]), expected)
    assert seen == ["3"] * 5 + ["7"] * 5
