"""What a run's validations generate: never what the test is measured on."""

from __future__ import annotations

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
