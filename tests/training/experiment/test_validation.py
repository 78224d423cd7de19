"""What a run's validations generate: never what the test is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from student.bundle import Latents
from training.config import changed
from training.evaluate import DIVERSITY_SEEDS, Plan
from training.experiment import validation
from training.experiment.presets import preset
from training.experiment.setup import SHORT_RUN_STEPS, Setup
from training.prompts import MEASURED, Prompts


def setup_of(steps: int) -> Setup:
    """A run of so many steps on as many prompts as a run can have; no network is opened."""
    absent = cast(Any, None)
    calibration, watched, tested = ([f"{part} {k}" for k in range(count)] for part, count in MEASURED.items())
    prompts = Prompts(lambda step, num: [], calibration, watched, tested)
    config = changed(preset("flux-dev"), {"steps": steps, "data.validation_diversity": 32})
    return Setup(config, absent, Latents(8, 8, 16, 2, 1.0, 0.0), prompts, absent, {}, absent, 0.0, "")


def noises(plan: Plan) -> set[int]:
    """The seed of every picture of a plan."""
    varied = [plan.varied_seed + k for k in range(DIVERSITY_SEEDS * len(plan.varied))]
    assert len({*plan.seeds(), *varied}) == len(plan.prompts) + len(varied)
    return {*plan.seeds(), *varied}


def test_a_checkpoint_is_chosen_on_other_noise_than_the_test_is_drawn_from() -> None:
    setup = setup_of(1000)
    test = setup.prompts.test
    watched, tested = validation._plan(setup), setup.plan(test, test[: setup.config.data.test_diversity])
    assert len(watched.prompts) == MEASURED["validation"] and len(tested.prompts) == MEASURED["test"]
    assert noises(watched).isdisjoint(noises(tested))


@pytest.mark.parametrize(("steps", "varied"), [(SHORT_RUN_STEPS - 1, 8), (SHORT_RUN_STEPS, 32)])
def test_a_short_run_measures_the_diversity_of_few_prompts(steps: int, varied: int) -> None:
    setup = setup_of(steps)
    assert setup.config.data.validation_diversity == 32
    assert validation._plan(setup).varied == setup.prompts.validation[:varied]


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"validation.min_diversity": 0.0, "shaping.steer": 0.0}, 0),
        ({"validation.min_diversity": 0.9, "shaping.steer": 0.0}, 1),
        ({"validation.min_diversity": 0.0, "shaping.steer": 0.85}, 1),
    ],
)
def test_the_teachers_diversity_is_measured_where_it_is_asked_for(
    changes: dict[str, float], asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the limit below which no checkpoint is chosen, and by alpha, which is steered by it."""
    measured: list[Setup] = []
    monkeypatch.setattr(validation, "_teacher_diversity", lambda setup: measured.append(setup) or 2.5)
    monkeypatch.setattr(validation, "Trainer", lambda *arguments, **named: named)
    setup, scored = setup_of(100), cast(Any, SimpleNamespace(score=None, terms=()))
    setup = replace(setup, config=changed(setup.config, changes), reward=scored, rewards={"heldout": scored})
    given = cast(Any, validation.trainer(setup, tmp_path))
    assert given["teacher_diversity"] == 2.5 * asked and len(measured) == asked


@pytest.mark.parametrize(("kind", "aside"), [("reward", {"heldout", "reported"}), ("disagreement", {"reported"})])
def test_a_run_that_begins_or_resumes_has_on_the_device_what_a_step_asks(
    kind: str, aside: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not only after a validation, of which a resumed run's next one may be hours away."""
    moved: list[tuple[set[str], str]] = []
    monkeypatch.setattr(validation, "move", lambda rewards, device: moved.append((set(rewards), device)))
    monkeypatch.setattr(validation, "Trainer", lambda *arguments, **named: named)
    scored = cast(Any, SimpleNamespace(score=None))
    rewards = dict.fromkeys(("trained", "heldout", "reported"), scored)
    config = changed(setup_of(100).config, {"gate.kind": kind, "validation.min_diversity": 0.0})
    validation.trainer(replace(setup_of(100), config=config, reward=scored, rewards=rewards), tmp_path)
    assert moved == [(aside, "cpu")]


def test_a_trainer_is_given_what_its_setup_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(validation, "move", lambda *given: None)
    monkeypatch.setattr(validation, "Trainer", lambda *given, **named: {"given": given, **named})
    monkeypatch.setattr(validation, "_validate", lambda *given: given)
    trained, heldout, windowed = (cast(Any, SimpleNamespace(score=name)) for name in ("trained", "heldout", "windowed"))
    setup = setup_of(100)
    setup = replace(
        setup,
        config=changed(setup.config, {"validation.min_diversity": 0.0}),
        roles=cast(Any, "roles"),
        rewards={"trained": trained, "heldout": heldout},
        reward=windowed,
        reward_p999=3.5,
    )
    found = cast(Any, validation.trainer(setup, tmp_path))
    assert found.pop("given") == (setup.config, "roles", tmp_path)
    assert found.pop("validate")("samplers", 40) == (setup, tmp_path, "samplers", 40)
    assert found == {
        "prompts": setup.prompts.train,
        "reward": "windowed",  # on the scale of what a step shows it
        "second": "heldout",
        "latent_shape": setup.latents.shape,
        "reward_p999": 3.5,
        "teacher_diversity": 0.0,
    }
