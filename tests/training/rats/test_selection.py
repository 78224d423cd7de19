"""Which checkpoint a run keeps: the best held-out score among those that are as varied as is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.training.shapes import small
from training.drawing import Painter
from training.rats.preset import shapes
from training.rats.trainer import Trainer, World

# By step: (held-out score, diversity). The last is the best one, and has lost its variety.
LOOKS = {0: (0.0, 2.0), 1: (0.3, 1.9), 2: (0.2, 2.0), 3: (0.9, 1.0)}


@pytest.mark.parametrize(
    ("floor", "margin", "chosen"),
    [(1.8, 0.0, 1), (1.95, 0.0, 2), (0.0, 0.0, 3), (5.0, 0.0, 0), (1.8, 0.09, 1), (1.8, 0.11, 2)],
)
def test_the_best_that_is_varied_enough_is_kept(floor: float, margin: float, chosen: int, tmp_path: Path) -> None:
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    states: dict[int, Tensor] = {}

    def validate(painters: Sequence[Painter], step: int) -> dict[str, float]:
        states[step] = next(painters[0].model.transformer.parameters()).detach().clone()
        heldout, diversity = LOOKS[step]
        watched = {"diversity_validation": diversity, "saturation": 0.0, "velocity_norm": 1.0}
        return {"heldout_validation": heldout, "reward_validation": heldout, **watched}

    def reward(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_BCHW[:, 0].mean((1, 2))

    config = replace(shapes(), steps=3, validate_every=1, batch=1, alpha=0.0, precision="fp32", lr=1e-2, warmup=1)
    config = replace(config, heldout_margin=margin)
    shape = model.latent_shape(64, 64)
    world = World(lambda step, num: ["a red heart"] * num, reward, validate, shape, diversity_floor=floor)
    Trainer(config, model, world, tmp_path / "run").run()
    assert len({float(value.sum()) for value in states.values()}) == 4
    assert torch.equal(next(model.transformer.parameters()), states[chosen])
