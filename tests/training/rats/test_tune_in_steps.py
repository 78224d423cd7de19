"""One step of tuning in closed form, on the network of one number: v = w x + c(prompt)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student.schedule import sigmas
from tests.training.rats.test_wiring import make
from training.rats.method import MICRO
from training.rats.trainer import Trainer

STUDENT, AVERAGE, RADIUS, ANGLE, SEED = 0.8, -0.4, 0.2, 0.7, 401
C = torch.tensor([0.01, 0.02]).view(2, 1, 1, 1)  # of the prompts "x" and "xx"
GRID = sigmas(3)


def of(folder: Path, settings: dict[str, Any]) -> Trainer:
    more = {"method": "tune", "student.nfe": (3,), "teacher.guided_steps": 0, "tune.radius": RADIUS, "seed": SEED}
    trainer = make(folder, {**more, **settings})
    for name, value in (("student", STUDENT), ("teacher", AVERAGE)):
        with trainer.roles.role(name) as model:
            model.transformer.w.data.fill_(value)
    trainer.method._reward_of = reward  # type: ignore[attr-defined]
    return trainer


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Curved, and another one for each prompt."""
    return torch.stack([(len(prompt) * image).sin().mean() for prompt, image in zip(prompts, images, strict=True)])


def walk(x: Tensor, grid: Sequence[float], w: float) -> list[Tensor]:
    found = [x]
    for at, after in zip(grid, [*grid[1:], 0.0], strict=True):
        x = x + (after - at) * (w * x + C)
        found.append(x)
    return found


def length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def drawn(seed: int, step: int, at: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + step + at * MICRO)


def slope_at(data: Tensor, hinge: float) -> tuple[Tensor, Tensor]:
    leaf = data.clone().requires_grad_()
    value = reward(leaf, ["x", "xx"])
    (found,) = torch.autograd.grad(value.clamp(max=hinge).sum(), leaf)
    return value.detach(), found


def branches_at(x: Tensor, at: int, step: int, place: int, hinge: float) -> tuple[Tensor, Tensor]:
    """By the average's own ends, from the sample's data and noise that is turned towards fresh noise."""
    sigma, gen = GRID[place], drawn(SEED * 17_000_023, step, at)
    v = AVERAGE * x + C
    data, noise = x - sigma * v, x + (1 - sigma) * v
    ends, rewards = [], []
    for fresh in [torch.randn(x.shape, generator=gen) for _ in range(4)]:
        start = (1 - sigma) * data + sigma * (math.cos(ANGLE) * noise + math.sin(ANGLE) * fresh)
        ends.append(walk(start, GRID[place:], AVERAGE)[-1])
        rewards.append(reward(ends[-1], ["x", "xx"]).clamp(max=hinge))
    value = torch.stack(rewards)
    advantage = (value - value.mean(0)) / value.std(0, correction=0)
    return value.mean(0), (advantage.view(4, 2, 1, 1, 1) * torch.stack(ends)).mean(0)


@pytest.mark.parametrize("branches", [0, 4])
@pytest.mark.parametrize(("step", "at"), [(0, 0), (1, 2), (2, 0), (3, 4), (6, 2)])
def test_the_student_is_fitted_from_the_averages_state_to_what_the_reward_wants(
    branches: int, step: int, at: int, tmp_path: Path
) -> None:
    hinge = 0.3
    trainer = of(tmp_path, {"tune.branches": branches, "tune.angle": ANGLE, "reward.hinge": hinge})
    batch = trainer._batches(step)[0]
    object.__setattr__(batch, "at", at)
    [batch] = trainer.method.teach([batch])
    place = int(torch.randint(3, (), generator=drawn(SEED * 13_000_027, step, at)))
    sigma, x = GRID[place], walk(batch.noise_BCHW, GRID, AVERAGE)[place]
    data = x - sigma * (AVERAGE * x + C)
    if branches:
        value, slope = branches_at(x, at, step, place, hinge)
    else:
        value, slope = slope_at(data, hinge)
    target = data + RADIUS * length(data) / length(slope).clamp(min=1e-30) * slope  # none above the hinge
    far = (x - sigma * (STUDENT * x + C) - target) / (RADIUS * length(data))
    done = trainer.method.step(batch)
    done.backward()
    assert float(done.log["sigma"]) == pytest.approx(sigma)
    assert float(done.log["reward_student"]) == pytest.approx(float(value.mean()), rel=1e-4)
    assert done.loss.item() == pytest.approx(float(length(far).square().mean()), rel=1e-3)
    wanted = (2 * far * -sigma * x / (RADIUS * length(data))).flatten(1).sum(1).mean()
    assert float(trainer.roles.model.transformer.w.grad) == pytest.approx(float(wanted), rel=1e-3)
    with trainer.roles.role("teacher") as average:
        assert average.transformer.w.grad is None


def test_all_of_a_rollouts_steps_and_both_sides_of_the_hinge_were_seen() -> None:
    """Of the steps and places above."""
    places = [(0, 0), (1, 2), (2, 0), (3, 4), (6, 2)]
    found = {int(torch.randint(3, (), generator=drawn(SEED * 13_000_027, step, at))) for step, at in places}
    assert found == {0, 1, 2}
