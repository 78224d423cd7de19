"""One step of each peer in closed form, on the network of one number: v = w x + c(prompt)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student.schedule import sigmas
from tests.training.rats.test_wiring import START_W, make
from training.rats import peers
from training.rats.peers import next_point
from training.rats.trainer import Trainer

STUDENT, AVERAGE, GUIDANCE = 0.8, -0.4, 3.0
C = torch.tensor([0.01, 0.02]).view(2, 1, 1, 1)  # of the prompts "x" and "xx"
EMPTY = 0.05


def of(folder: Path, method: str, seed: int = 401) -> Trainer:
    trainer = make(folder, {"method": method, "reward.weight": 0.0, "seed": seed})
    for name, value in (("student", STUDENT), ("teacher", AVERAGE)):
        with trainer.roles.role(name) as model:
            model.transformer.w.data.fill_(value)
    return trainer


def walk(x: Tensor, grid: Sequence[float], guided: bool, w: float) -> list[Tensor]:
    found = [x]
    for at, after in zip(grid, [*grid[1:], 0.0], strict=True):
        c = EMPTY + GUIDANCE * (C - EMPTY) if guided else C
        x = x + (after - at) * (w * x + c)
        found.append(x)
    return found


def backward(trainer: Trainer, done: Any) -> float:
    done.backward()
    return float(trainer.roles.model.transformer.w.grad)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_consistency_jumps_from_a_point_as_the_average_does_from_the_next(tmp_path: Path, step: int) -> None:
    """Of the guided start's path in the first two steps, of the average's own after them."""
    trainer = of(tmp_path, "consistency")
    (batch,) = trainer.method.teach(trainer._batches(step))
    grid, x = sigmas(3), walk(batch.noise_BCHW, sigmas(3), step < 2, START_W if step < 2 else AVERAGE)
    gen = torch.Generator().manual_seed(401 * 7_000_003 + step)
    at = int(torch.randint(3, (), generator=gen))
    after, end = next_point(grid[at], grid, sigmas(2))
    next_x = x[at] + (after - grid[at]) * (x[at + 1] - x[at]) / ([*grid, 0.0][at + 1] - grid[at])
    target = next_x + (end - after) * (AVERAGE * next_x + C)
    apart = x[at] + (end - grid[at]) * (STUDENT * x[at] + C) - target
    done = trainer.method.step(batch)
    assert float(done.log["sigma"]) == grid[at]
    assert float(done.log["loss"]) == done.loss.item() == pytest.approx(float(apart.square().mean()), rel=1e-4)
    slope = float((2 * apart * (end - grid[at]) * x[at]).mean())
    assert backward(trainer, done) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_matching_moves_a_sample_from_its_critics_data_to_the_guided_starts(tmp_path: Path, step: int) -> None:
    trainer = of(tmp_path, "matching")
    batches = trainer._batches(step)
    (batch,) = trainer.method.teach(batches)
    assert batch is batches[0] and batch.teacher is None
    gen = torch.Generator().manual_seed(401 * 9_000_011 + step)
    last = int(torch.randint(2, (), generator=gen))
    at, x = sigmas(2)[last], walk(batch.noise_BCHW, sigmas(2), False, STUDENT)[last]
    data = x - at * (STUDENT * x + C)

    critic = torch.nn.Parameter(torch.tensor(START_W))
    optimizer, losses = torch.optim.AdamW([critic], 0.05, betas=(0.9, 0.99), weight_decay=0.0), []
    for _ in range(5):
        sigma, noise = 0.02 + 0.96 * float(torch.rand((), generator=gen)), torch.randn(data.shape, generator=gen)
        noisy = (1 - sigma) * data + sigma * noise
        loss = (critic * noisy + C - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sigma, noise = 0.02 + 0.96 * float(torch.rand((), generator=gen)), torch.randn(data.shape, generator=gen)
    noisy = (1 - sigma) * data + sigma * noise
    real = noisy - sigma * (START_W * noisy + EMPTY + GUIDANCE * (C - EMPTY))
    fake = noisy - sigma * (critic.detach() * noisy + C)
    gradient = (fake - real) / (data - real).abs().mean((1, 2, 3), keepdim=True)

    done = trainer.method.step(batch)
    assert done.log["critic_loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    state = trainer.method.state()
    assert float(state["critic"]["w"]) == pytest.approx(float(critic.detach()), rel=1e-4)
    assert state["critic_optimizer"]["state"][0]["step"] == 5
    assert float(done.log["loss"]) == pytest.approx(float(gradient.square().mean()) / 2, rel=1e-3)
    assert backward(trainer, done) == pytest.approx(float((gradient * -at * x).mean()), rel=1e-3)

    other = of(tmp_path / "other", "matching", seed=402)
    other.method.load_state(state)
    assert float(other.method.state()["critic"]["w"]) == float(state["critic"]["w"])
    assert float(trainer.method.step(batch).log["critic_loss"]) != done.log["critic_loss"], "it goes on from there"


def test_a_gradient_that_is_no_number_is_no_step_of_the_critic(tmp_path: Path) -> None:
    """Its loss may be one all the same; a single such step would leave it without numbers for good."""
    trainer = of(tmp_path, "matching")
    matching: Any = trainer.method
    critic, turns = matching._critic, iter((1.0, torch.inf, 1.0, torch.nan, 1.0))
    critic.w.register_hook(lambda gradient: gradient * next(turns))
    log = trainer._step(0)
    assert "skipped" not in log and critic.w.isfinite() and float(critic.w.detach()) != START_W
    assert matching.state()["critic_optimizer"]["state"][0]["step"] == 3


@pytest.mark.parametrize(("agreed", "steps"), [(True, 5), (False, 0)])
def test_the_critic_is_one_for_all_processes(
    agreed: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are means over them, and none makes a step that another one leaves out."""
    trainer = of(tmp_path, "matching")
    asked: list[tuple[float, int]] = []

    class Several:
        def agree(self, here: bool) -> bool:
            assert here is True
            return agreed

        def mean_gradients(self, parameters: Sequence[torch.nn.Parameter], micro_batches: int) -> None:
            [parameter] = parameters
            asked.append((abs(float(parameter.grad)), micro_batches))
            parameter.grad.zero_()  # as if the others' were its opposite

    monkeypatch.setattr(peers, "Processes", Several)
    before = float(trainer.method.state()["critic"]["w"])
    done = trainer.method.step(trainer._batches(0)[0])
    assert float(trainer.method.state()["critic"]["w"]) == before and done.loss.isfinite()
    assert len(asked) == steps and all(slope > 0 and micro_batches == 1 for slope, micro_batches in asked)
