"""The figures of a validation and of the test, in closed form: whose pictures, scores, and weights they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.training.experiment.test_validation import setup_of
from training import evaluate
from training.config import changed
from training.evaluate import DIVERSITY, Evaluation, Plan
from training.experiment import validation
from training.experiment.setup import Setup


class Drawing:
    """A sampler whose picture of seed s is all s / 20, and whose velocities are 2 x and 3."""

    def __init__(self, steps: int = 2, video: bool = False) -> None:
        self.sigmas, self.guidance, self.video = (1.0,) * steps, 1.0, video
        self.model: Any = SimpleNamespace(device=torch.device("cpu"))
        self.drawn: list[tuple[str, int]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], shape: object, batch: int) -> Tensor:
        assert len(prompts) <= batch
        self.drawn += zip(prompts, seeds, strict=True)
        frames = (5,) if self.video else ()
        return torch.stack([torch.full((*frames, 3, 2, 2), seed / 20) for seed in seeds])

    def autocast(self) -> Any:
        return nullcontext()

    def trajectory(self, x: Tensor, prompts: Sequence[str]) -> Any:
        assert len(x) == len(prompts)
        return SimpleNamespace(v=(2 * x, torch.full_like(x, 3.0)))


class Watched(nn.Module):
    """A reward that is the mean of a picture times a factor, and notes where it is."""

    def __init__(self, factor: float, places: list[str]) -> None:
        super().__init__()
        self.factor, self.places = factor, places
        self.terms = [SimpleNamespace(reward=self)]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * images.flatten(1).mean(1)

    def to(self, device: Any, *_: Any, **__: Any) -> Any:
        self.places.append(str(device))
        return self


PLAN = Plan([f"watched {k}" for k in range(21)], ["one", "two", "three"], (1, 2, 2), 2, 0, 50)


def small(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Setup, dict[str, list[str]]]:
    places: dict[str, list[str]] = {"trained": [], "heldout": []}
    rewards: Any = {"trained": Watched(1.0, places["trained"]), "heldout": Watched(-2.0, places["heldout"])}
    spread = {DIVERSITY: [1.0, 2.0, 6.0], "diversity_clip": [4.0, 5.0, 6.0]}
    roles: Any = SimpleNamespace(
        rollouts=nullcontext, model=SimpleNamespace(device=torch.device("cpu")), role=lambda name: nullcontext()
    )
    setup = setup_of(1000)
    measure: Any = SimpleNamespace(diversities=lambda sampler, plan: spread)
    monkeypatch.setattr(validation, "_plan", lambda _: PLAN)
    return replace(
        setup, config=changed(setup.config, changes), rewards=rewards, roles=roles, measure=measure
    ), places  # fmt: skip


def test_the_velocitys_size_is_the_root_of_its_mean_square_averaged_over_steps() -> None:
    """Over all the prompts, the last batch of which is smaller."""
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(7))
    expected = (math.sqrt(float((2 * noise).square().mean())) + 3.0) / 2
    plan = replace(PLAN, first_seed=7)
    assert validation._velocity_norm(cast(Any, Drawing()), plan) == pytest.approx(expected, rel=1e-6)


def test_a_validations_figures_are_the_means_over_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 0, 0.05 ... 1: two of the twenty-one are saturated, and their mean is a half."""
    setup, _ = small(monkeypatch)
    sampler = Drawing()
    shown, row = validation._validated(setup, cast(Any, sampler))
    assert sampler.drawn == [(f"watched {k}", k) for k in range(21)]
    torch.testing.assert_close(shown.flatten(1).mean(1), torch.arange(8) / 20)
    assert row.pop("velocity_norm") > 0
    assert row == pytest.approx(
        {
            "reward_validation": 0.5,
            "heldout_validation": -1.0,
            f"{DIVERSITY}_validation": 3.0,
            "diversity_clip_validation": 5.0,
            "saturation": 2 / 21,
        }
    )
    middle, _ = validation._validated(setup, cast(Any, Drawing(video=True)))
    assert middle.shape == (8, 3, 2, 2), "of a video its middle frame is shown"


@pytest.mark.parametrize(
    ("kind", "away"), [("disagreement", []), ("constant", ["cpu"])]
)  # whichever a step does not ask is put away
def test_a_validation_averages_over_step_counts_and_puts_away_what_no_step_asks(
    kind: str, away: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup, places = small(monkeypatch, **{"gate.kind": kind})
    rows = iter([{"a": 1.0, "b": -2.0}, {"a": 4.0, "b": 8.0}])
    shown: list[tuple[Any, Path]] = []
    monkeypatch.setattr(validation, "_validated", lambda _, sampler: (torch.zeros(1), next(rows)))
    monkeypatch.setattr(validation.figures, "grid", lambda pictures, path: shown.append((list(pictures), path)))
    found = validation._validate(setup, tmp_path, cast(Any, [Drawing(2), Drawing(4)]), 120)
    assert found == {"a": 2.5, "b": 3.0}
    assert shown == [(["2 steps, after 120", "4 steps, after 120"], tmp_path / "grids" / "000120.png")]
    assert (tmp_path / "grids").is_dir()
    assert places == {"trained": [], "heldout": ["cpu", *away]}


def test_the_tests_pictures_are_of_its_first_eight_prompts_at_seeds_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, _ = small(monkeypatch)
    sampler, row, asked = Drawing(), cast(Any, object()), []
    monkeypatch.setattr(Setup, "sampler", lambda self, *given: asked.append(given) or sampler)
    monkeypatch.setattr(validation, "measured_on_test", lambda *given: asked.append(given) or row)
    found, pictures = validation.test_figures(setup, model := cast(Any, object()), "teacher", 50)
    assert found is row and asked == [(model, "teacher", 50), (setup, sampler, "teacher")]
    assert sampler.drawn == [(setup.prompts.test[k], k) for k in range(8)]
    torch.testing.assert_close(pictures.flatten(1).mean(1), torch.arange(8) / 20)


def test_figures_on_the_test_are_kept_by_weights_prompts_rewards_and_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A teacher's are its own whatever is trained; a student's are those of its weights."""
    monkeypatch.setattr(evaluate, "CACHE", tmp_path)
    monkeypatch.setattr(validation, "hash_model", lambda model: f"/{model.weights}")
    monkeypatch.setattr(validation, "sources", lambda rewards: rewards["trained"])
    keys: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        validation, "fingerprint", lambda weights, sampler, plan, what: keys.append((weights, what, plan)) or "key"
    )
    made: list[tuple[str, Plan]] = []

    def evaluated(label: str, sampler: Any, plan: Plan) -> Evaluation:
        made.append((label, plan))
        return Evaluation(label, 4, 1.0, {}, {}, [])

    base = setup_of(1000)
    base = replace(
        base,
        teacher="T",
        rewards=cast(Any, {"trained": "R"}),
        measure=cast(Any, SimpleNamespace(version="V", evaluate=evaluated)),
        config=changed(base.config, {"data.test_diversity": 30}),
    )
    sampler: Any = SimpleNamespace(sigmas=(1.0,) * 4, model=SimpleNamespace(weights="W"))
    rows = [validation.measured_on_test(base, sampler, label) for label in ("teacher", "student", "teacher")]
    kind = base.config.reward.weights
    assert [key[:2] for key in keys] == [
        ("T", f"teacher{kind}RV"), ("T/W", f"student{kind}RV"), ("T", f"teacher{kind}RV"),
    ]  # fmt: skip
    assert len(made) == 1 and rows[2] == rows[0]
    for steps, varied in ((49, 8), (50, 30)):
        setup = replace(base, config=changed(base.config, {"steps": steps}))
        validation.measured_on_test(setup, sampler, "teacher")
        assert keys[-1][2] == base.plan(base.prompts.test, base.prompts.test[:varied])


def test_the_teachers_diversity_is_at_its_own_step_count_on_the_watched_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate, "CACHE", tmp_path)
    monkeypatch.setattr(validation, "fingerprint", lambda *given: "-".join(map(str, (given[0], given[3]))))
    asked: list[Any] = []
    sampler = Drawing(28)
    monkeypatch.setattr(Setup, "sampler", lambda self, *given: asked.append(given[1:]) or sampler)
    setup, _ = small(monkeypatch, **{"teacher.reference_nfe": 28})
    roles: list[str] = []
    setup = replace(
        setup,
        teacher="T",
        roles=cast(Any, SimpleNamespace(model=None, role=lambda name: roles.append(name) or nullcontext())),
        measure=cast(Any, SimpleNamespace(diversity=lambda sampler, plan: asked.append(plan) or [1.0, 2.0, 6.0])),
    )
    assert [validation._teacher_diversity(setup) for _ in range(2)] == [3.0, 3.0]
    assert asked == [("teacher", 28), replace(PLAN, prompts=[]), ("teacher", 28)], "the second is kept"
    assert roles == ["start", "start"] and (tmp_path / "T-watched.json").is_file()


@pytest.mark.parametrize("batch", [3, 5, 16])
def test_eight_pictures_are_shown_however_many_are_drawn_at_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, _ = small(monkeypatch)
    monkeypatch.setattr(validation, "_plan", lambda _: replace(PLAN, batch=batch))
    shown, _ = validation._validated(setup, cast(Any, Drawing()))
    torch.testing.assert_close(shown.flatten(1).mean(1), torch.arange(8) / 20)
