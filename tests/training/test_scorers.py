"""Several rewards as one scalar of a role: from kept raw scores and from pictures, against the formula by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rewards.interface import RewardError
from rewards.weighted import Calibration, Term, Weighted
from training import scorers
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


class Opened(nn.Module):
    """Notes how it was opened; of some names there is no gradient."""

    def __init__(self, name: str, **how: Any) -> None:
        super().__init__()
        self.name, self.how, self.differentiable = name, how, name != "blind"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(scorers, "find", Opened)
    return SimpleNamespace(tokenise=lambda prompts: (f"first ids of {prompts}", f"second ids of {prompts}"))


def test_a_runs_rewards_are_opened_as_it_says(model: Any) -> None:
    """On its device, in their type, with their weights, and with the model's own first tokenizer."""
    found = scorers.open_rewards("one:2.5,two:-0.5", "three", model, True, "meta", torch.bfloat16, "blind:3")
    terms = {term.name: term for term in all_terms(found)}
    assert {role: [term.name for term in weighted.terms] for role, weighted in found.items()} == {
        "trained": ["trained-1", "trained-2"], "heldout": ["heldout"], "reported": ["reported"],
    }  # fmt: skip
    asked = {
        "trained-1": ("one", 2.5),
        "trained-2": ("two", -0.5),
        "heldout": ("three", 1.0),
        "reported": ("blind", 3.0),
    }
    for name, (own, weight) in asked.items():
        term, opened = terms[name], cast(Any, terms[name].reward)
        assert (term.asked, opened.name, term.weight, term.device, term.calibration) == (own, own, weight, "meta", None)
        assert {key: opened.how[key] for key in ("device", "dtype")} == {"device": "meta", "dtype": torch.bfloat16}
        assert opened.how["tokenizer"](["a"]) == "first ids of ['a']"
        assert term.source == _source(own, opened)
    assert scorers.sources(found) == "".join(term.source for term in terms.values())
    assert len({term.source for term in terms.values()}) == 4
    assert set(scorers.open_rewards("one", "two", model, True)) == {"trained", "heldout"}


def test_only_what_is_trained_on_must_have_a_gradient_and_no_reward_has_two_roles(model: Any, tmp_path: Path) -> None:
    scorers.open_rewards("one", "blind", model, True)
    scorers.open_rewards("blind", "one", model, False)
    with pytest.raises(RewardError, match="reward 'blind' has no gradient"):
        scorers.open_rewards("one,blind", "two", model, True)
    folder = tmp_path / "scorer"
    folder.mkdir()
    same = f"shapes:{tmp_path}/./scorer"
    with pytest.raises(RewardError, match="is both trained on and held out"):
        scorers.open_rewards(str(folder), f"two,{same}", model, True)
    for roles in ((f"one,{same}", "two"), ("one", f"two,{same}")):
        with pytest.raises(RewardError, match="is already the trained or the held-out reward"):
            scorers.open_rewards(*roles, model, True, reported=str(folder))


def test_figures_of_a_users_own_reward_belong_to_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "a_users_reward.py"
    own.write_text("class R: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward: Any = object()
    before = _source("a_users_reward:R", reward)
    assert before == _source("a_users_reward:R", reward) != _source("a_users_reward:S", reward)
    own.write_text("class R: ...  # changed\n")
    assert _source("a_users_reward:R", reward) != before


def test_networks_alone_are_moved(model: Any) -> None:
    moved: list[tuple[str, str]] = []
    rewards = scorers.open_rewards("one", "two", model, True)
    for term in all_terms(rewards):
        term.reward.to = lambda device, name=term.asked: moved.append((name, device))  # type: ignore[attr-defined]
    both = {**rewards, "reported": Weighted((Term("own", Own(_red)),))}
    scorers.move(both, "cuda:1")
    assert moved == [("one", "cuda:1"), ("two", "cuda:1")]


def test_every_reward_is_tried_out_and_only_those_that_are_trained_on_for_their_gradient() -> None:
    """One that only reports too: its fault would be found when all is trained."""
    asked: list[tuple[str, bool]] = []

    def own(name: str) -> Term:
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            asked.append((name, torch.is_grad_enabled() and images.requires_grad))
            if name == broken:
                raise ValueError("no such picture")
            return images.mean((1, 2, 3))

        return Term(name, Own(score), asked=name)

    broken, images = "", torch.rand(2, 3, 4, 4)
    rewards = {
        "trained": Weighted((own("one"), own("two"))),
        "heldout": Weighted((own("three"),)),
        "reported": Weighted((own("four"),)),
    }
    for learns in (True, False):
        asked.clear()
        scorers.try_out(rewards, images, ["a", "a"], learns)
        assert asked == [("one", learns), ("two", learns), ("three", False), ("four", False)]
    for broken in ("one", "two", "three", "four"):
        with pytest.raises(RewardError, match=f"'{broken}' failed"):
            scorers.try_out(rewards, images, ["a", "a"], True)
