"""What a run's figures decide: the checkpoint that is kept, alpha where diversity steers it, and the gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.training.shapes import small
from training.config import changed
from training.experiment.presets import shapes
from training.rats.config import RatsConfig
from training.rats.loss import steered
from training.rats.roles import Roles
from training.rats.trainer import Trainer
from training.sampler import Sampler
from training.steplog import read_log

# By step: (held-out score, diversity). The last is the best one, and has lost its variety.
VALIDATIONS = {0: (0.0, 2.0), 1: (0.3, 1.9), 2: (0.2, 2.0), 3: (0.9, 1.0)}


def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean red of a picture."""
    return images_BCHW[:, 0].mean((1, 2))


def higher(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    """A second reward, 0.3 above the first."""
    return reward(images_BCHW, prompts) + 0.3


def trainer(config: RatsConfig, model: Flux, run: Path, validate: Any, teacher_diversity: float = 0.0) -> Trainer:
    """A run on one prompt."""
    return Trainer(
        config,
        Roles.of(config, model),
        run,
        prompts=lambda step, num: ["a red heart"] * num,
        reward=reward,
        validate=validate,
        latent_shape=model.latent_shape(64, 64),
        teacher_diversity=teacher_diversity,
        second=higher,
    )


@pytest.mark.parametrize(("floor", "chosen"), [(0.9, 1), (0.975, 2), (0.0, 3), (1.0, 2)])
def test_the_best_that_is_varied_enough_is_kept(floor: float, chosen: int, tmp_path: Path) -> None:
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    states: dict[int, Tensor] = {}

    def validate(samplers: Sequence[Sampler], step: int) -> dict[str, float]:
        states[step] = next(samplers[0].model.transformer.parameters()).detach().clone()
        heldout, diversity = VALIDATIONS[step]
        watched = {"diversity_validation": diversity, "saturation": 0.0, "velocity_norm": 1.0}
        trained = -heldout  # what is trained on says the opposite, and must not be asked
        return {"heldout_validation": heldout, "reward_validation": trained, **watched}

    config = changed(
        shapes(),
        {
            "steps": 3,
            "validation.every": 1,
            "optim.batch": 1,
            "shaping.alpha": 0.0,
            "compute.precision": "fp32",
            "optim.lr": 1e-2,
            "optim.warmup": 1,
        },
    )
    config = changed(config, {"validation.min_diversity": floor})
    trainer(config, model, tmp_path / "run", validate, teacher_diversity=2.0).run()
    assert len({float(value.sum()) for value in states.values()}) == 4
    assert torch.equal(next(model.transformer.parameters()), states[chosen])


def test_alpha_follows_the_diversity_of_each_validation(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    diversities = {0: 5.0, 2: 1.9, 4: 1.5}

    def validate(samplers: Sequence[Sampler], step: int) -> dict[str, float]:
        watched = {"diversity_validation": diversities[step], "saturation": 0.0, "velocity_norm": 1.0}
        return {"heldout_validation": 0.0, "reward_validation": 0.0, **watched}

    config = changed(
        shapes(),
        {
            "steps": 4,
            "validation.every": 2,
            "optim.batch": 1,
            "teacher.nfe": 2,
            "compute.precision": "fp32",
            "shaping.steer": 0.9,
        },
    )
    run = tmp_path / "run"
    trainer(changed(config, {"steps": 2}), model, run, validate, teacher_diversity=2.0).run()
    other = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    trainer(config, other, run, validate, teacher_diversity=2.0).run()
    alphas = [row["alpha"] for row in read_log(run / "log.jsonl") if "alpha" in row]
    lower = 8.0 * (0.9 * 2.0 / 1.9) ** 10
    assert alphas == pytest.approx([8.0, 8.0, lower, lower]), "the validation before the first step counts for nothing"
    assert steered(4.0, 1.5, 1.8) == pytest.approx(4.0 * 1.2**10)
    assert steered(4.0, 1.8, 1.8) == 4.0


GATES = {
    "reward": lambda t, s: (t - s) / 0.5,
    "confidence": lambda t, s: t / 0.5,
    "constant": lambda t, s: 0.0,
    # g = 2 sigmoid(0.3 / tau) - 1 whatever the pictures are, written as the sigmoid of its logit
    "disagreement": lambda t, s: math.log(math.tanh(0.3) / (1 - math.tanh(0.3))),
}


@pytest.mark.parametrize("name", GATES)
def test_each_gate_is_the_function_of_the_rewards_that_it_says(name: str, tmp_path: Path) -> None:
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    names = ("heldout_validation", "reward_validation", "diversity_validation", "saturation", "velocity_norm")
    measured = dict.fromkeys(names, 1.0)
    config = changed(
        shapes(),
        {
            "steps": 2,
            "optim.batch": 1,
            "teacher.nfe": 2,
            "compute.precision": "fp32",
            "gate.kind": name,
            "gate.tau": 0.5,
        },
    )
    trainer(config, model, tmp_path / "run", lambda *_: measured).run()
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "gate_mean" in row]
    expected = [1 / (1 + math.exp(-GATES[name](row["reward_teacher"], row["reward_student"]))) for row in rows]
    assert len(rows) == 2 and [row["gate_mean"] for row in rows] == pytest.approx(expected, abs=1e-5)
