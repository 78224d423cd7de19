"""Several rewards as one scalar of a role: from kept raw scores and from pictures, against the formula by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rewards.interface import RewardError
from rewards.weighted import Calibration
from training.evaluate import Evaluation
from training.instruments import Instrument, Scale, _source, calibration, over_frames


def _red(images: Tensor, prompts: object) -> Tensor:
    return images[:, 0].mean((1, 2))


def _bright(images: Tensor, prompts: object) -> Tensor:
    return images.mean((1, 2, 3))


SCALE = Scale(
    [
        Instrument("trained-1", "red", "trained", 1.0, _red, "red"),
        Instrument("trained-2", "bright", "trained", -0.5, _bright, "bright"),
        Instrument("heldout", "bright", "heldout", 1.0, _bright, "bright"),
    ],
    {"trained-1": Calibration(0.2, 0.1), "trained-2": Calibration(0.5, 0.25), "heldout": Calibration(0.0, 2.0)},
)


def test_a_role_is_the_weighted_sum_of_its_standardised_rewards() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    red, bright = _red(images, None), _bright(images, None)
    expected = (red - 0.2) / 0.1 - 0.5 * (bright - 0.5) / 0.25
    torch.testing.assert_close(SCALE.score("trained", images, ["a"] * 3), expected)
    torch.testing.assert_close(SCALE.score("heldout", images, ["a"] * 3), bright / 2)
    scores = {"trained-1": red.tolist(), "trained-2": bright.tolist(), "heldout": bright.tolist()}
    row = Evaluation("student", 4, 1.0, scores, {}, [])
    assert SCALE.standardised(row, "trained") == pytest.approx(expected.tolist(), abs=1e-5)


def test_scores_that_are_all_the_same_cannot_be_standardised() -> None:
    assert calibration("x", [1.0, 3.0]) == Calibration(2.0, 2**0.5)
    with pytest.raises(RewardError, match="reward 'x' cannot be standardised"):
        calibration("x", [1.0, 1.0])


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
    torch.testing.assert_close(over_frames(numbered)(video, ["3", "7"]), expected)
    assert seen == ["3"] * 5 + ["7"] * 5
