"""Who is asked what in a training step: a family that notes every call, in the trainer's own loop.

The network is one number w: v = w x + c(prompt). So every state, loss and average has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from student.families.family import Condition
from student.schedule import sigmas
from training.config import changed
from training.experiment.presets import shapes
from training.rats import trainer as trainer_module
from training.rats.roles import Roles
from training.rats.trainer import Trainer

SHAPE = (2, 2, 2)
START_W = 0.5


class Network(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([START_W]))


@dataclass(frozen=True)
class Asked:
    """One call of the network."""

    network: int
    sigma: float
    x: Tensor
    texts: tuple[str, ...]
    gradient: bool
    autocast: bool


class Recording(nn.Module):
    """What the trainer needs of a family."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: Any = Network()
        self.vae: Any = None
        self.asked: list[Asked] = []
        self.device = torch.device("cpu")

    def sigmas(self, nfe: int, shape: Sequence[int]) -> tuple[float, ...]:
        return sigmas(nfe)

    def encode(self, prompts: Sequence[str]) -> Condition:
        return Condition(torch.tensor([[[float(len(prompt))]] for prompt in prompts]))

    def velocity(self, x: Tensor, sigma: float, condition: Condition) -> Tensor:
        texts = tuple("x" * int(row.item()) for row in condition.tokens_BLE.flatten())
        self.asked.append(
            Asked(
                id(self.transformer), sigma, x.detach().clone(), texts, torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )  # fmt: skip
        return self.transformer.w * x + 0.01 * condition.tokens_BLE.view(-1, *[1] * (x.ndim - 1))

    def guided(self, prompt: Tensor, empty: Tensor, guidance: float) -> Tensor:
        return empty + guidance * (prompt - empty)

    def decode(self, x: Tensor) -> Tensor:
        return x


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def figures(heldout: float = 0.0, trained: float = 0.0) -> dict[str, float]:
    watched = {"diversity_validation": 1.0, "saturation": 0.0, "velocity_norm": 1.0}
    return {"heldout_validation": heldout, "reward_validation": trained, **watched}


def make(folder: Path, settings: dict[str, Any] | None = None, validate: Any = None) -> Trainer:
    """A run of four steps, the first two of which follow the guided start."""
    plain = {
        "steps": 4, "student.nfe": (2,), "teacher.nfe": 3, "optim.batch": 2, "optim.lr": 0.05, "optim.warmup": 2,
        "optim.decay": 0.5, "optim.clip_norm": 0.25, "compute.precision": "fp32", "validation.every": 2,
        "teacher.guided_steps": 2, "teacher.guidance": 3.0, "teacher.negative_prompt": "xxxxx", "teacher.ema": 0.75,
        "gradient.mode": "full", "shaping.l2_weight": 0.3, "shaping.cosine_weight": 2.0, "shaping.alpha": 1.0,
    }  # fmt: skip
    config = changed(shapes(), {**plain, **(settings or {})})
    return Trainer(
        config, Roles.of(config, Recording()), folder, prompts=lambda step, num: ["x" * (k + 1) for k in range(num)],
        reward=reward, validate=validate or (lambda samplers, step: figures()), latent_shape=SHAPE,
    )  # fmt: skip


def networks(trainer: Trainer) -> dict[str, int]:
    found = {}
    for name in ("student", "teacher", "start"):
        with trainer.roles.role(name) as model:
            found[name] = id(model.transformer)
    assert len(set(found.values())) == 3
    return found


def weight(trainer: Trainer, name: str) -> float:
    with trainer.roles.role(name) as model:
        return float(model.transformer.w.detach().float())


def step(trainer: Trainer, number: int) -> list[Asked]:
    """Make one step; returns what was asked meanwhile."""
    asked = trainer.roles.model.asked
    before = len(asked)
    trainer._step(number)
    return list(asked[before:])


def test_both_begin_at_the_same_noise_and_walk_their_own_grids(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    known, asked = networks(trainer), step(trainer, 3)
    teacher = [call for call in asked if call.network == known["teacher"]]
    student = [call for call in asked if call.network == known["student"]]
    assert len(asked) == len(teacher) + len(student)
    assert [call.sigma for call in teacher] == pytest.approx(sigmas(3))
    assert [call.sigma for call in student] == pytest.approx(sigmas(2))
    assert torch.equal(teacher[0].x, student[0].x) and teacher[0].x.std() > 0.3
    assert {call.texts for call in asked} == {("x", "xx")}
    assert all(call.gradient for call in student) and not any(call.gradient for call in teacher)


def test_the_first_phase_follows_the_guided_start_and_the_second_the_average(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    known = networks(trainer)
    first, second = step(trainer, 1), step(trainer, 2)
    start = [call for call in first if call.network == known["start"]]
    assert [call.texts for call in start] == [("xxxxx", "xxxxx", "x", "xx")] * 3, "both velocities in one call"
    assert not [call for call in first if call.network == known["teacher"]]
    assert {call.network for call in second} == {known["student"], known["teacher"]}
    assert {call.texts for call in second} == {("x", "xx")}


def test_the_teacher_begins_its_phase_as_the_student_and_then_follows_it_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []  # student and teacher after each step
    trainer = make(tmp_path)
    real = trainer._step

    def noting(number: int) -> dict[str, float]:
        if number == 2:
            assert weight(trainer, "teacher") == pytest.approx(seen[-1][0])  # restarted, before the step
        log = real(number)
        seen.append((weight(trainer, "student"), weight(trainer, "teacher")))
        return log

    monkeypatch.setattr(trainer, "_step", noting)
    trainer.run()
    assert len({round(student, 6) for student, _ in seen}) == 4
    expected = seen[1][0]
    for student, teacher in seen[2:]:
        expected = 0.75 * expected + 0.25 * student
        assert teacher == pytest.approx(expected, rel=1e-5)
    assert weight(trainer, "start") == START_W


def test_without_a_restart_the_teacher_goes_on_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students: list[float] = []
    trainer = make(tmp_path, {"teacher.restart": False})
    real = trainer._step

    def noting(number: int) -> dict[str, float]:
        assert number > 2 or weight(trainer, "teacher") == START_W
        log = real(number)
        students.append(weight(trainer, "student"))
        return log

    monkeypatch.setattr(trainer, "_step", noting)
    trainer.run()
    expected = 0.75 * (0.75 * START_W + 0.25 * students[2]) + 0.25 * students[3]
    assert weight(trainer, "teacher") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("precision", "autocast"), [("bf16", True), ("fp32", False)])
def test_every_call_is_in_the_runs_precision(tmp_path: Path, precision: str, autocast: bool) -> None:
    asked = step(make(tmp_path, {"compute.precision": precision}), 0)
    assert {call.autocast for call in asked} == {autocast}


def test_gradients_are_clipped_and_the_rate_rises_stays_and_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    rates: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, max_norm: float, *rest: Any, **more: Any) -> Any:
        norms.append(max_norm)
        return real(parameters, max_norm, *rest, **more)

    monkeypatch.setattr(trainer_module.torch.nn.utils, "clip_grad_norm_", clip)
    trainer = make(tmp_path)
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"])
    )  # fmt: skip
    for number in range(4):
        step(trainer, number)
    assert norms == [0.25] * 4
    assert rates == pytest.approx([0.05 * share for share in (0.5, 1.0, 1.0, 0.5)])


def test_the_heldout_score_alone_picks_the_checkpoint(tmp_path: Path) -> None:
    """The trained reward rises to the end; the held-out one is best in the middle."""
    states: dict[int, float] = {}

    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        states[step] = float(samplers[0].model.transformer.w.detach())
        return figures(heldout={0: 0.0, 1: 0.2, 2: 0.9, 3: 0.5, 4: 0.1}[step], trained=float(step))

    trainer = make(tmp_path, {"validation.every": 1}, validate)
    trainer.run()
    assert trainer.best_at == 2 and weight(trainer, "student") == states[2] != states[4]


def test_shaping_weighs_distance_and_direction_as_it_is_told(tmp_path: Path) -> None:
    """From the definition: 0.3 mse + 2 (1 - cos) of the predicted data at sigma 0.5 and 0, at equal noise."""
    trainer = make(tmp_path, {"optim.batch": 1})
    with trainer.roles.role("teacher") as model:
        model.transformer.w.data.fill_(-0.4)
    (batch,) = trainer.method.teach(trainer._batches(3))
    log = trainer.method.step(batch).log

    def path(w: float, grid: Sequence[float]) -> list[tuple[float, Tensor, Tensor]]:
        x, found = batch.noise_BCHW, []
        for at, after in zip(grid, [*grid[1:], 0.0], strict=True):
            v = w * x + 0.01
            found.append((at, x, v))
            x = x + (after - at) * v
        return [*found, (0.0, x, torch.zeros_like(x))]

    student, teacher = path(START_W, sigmas(2)), path(-0.4, sigmas(3))
    at, x, v = teacher[1]  # the teacher's step from 2/3, at 0.5
    pairs = [
        (student[1][1] - 0.5 * student[1][2], x + (0.5 - at) * v - 0.5 * v),
        (student[-1][1], teacher[-1][1]),
    ]

    def distance(a: Tensor, b: Tensor) -> float:
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        return 0.3 * float((a - b).square().mean()) + 2.0 * (1 - cosine)

    assert log["shaping"] == pytest.approx(sum(distance(a, b) for a, b in pairs) / 2, rel=1e-4)
    assert math.isfinite(log["loss"]) and log["shaping"] > 0.01


@pytest.mark.parametrize(("highest", "said"), [(0.9, True), (1.1, False)])
def test_a_mean_reward_above_what_the_teacher_reaches_is_an_alarm(highest: float, said: bool, tmp_path: Path) -> None:
    trainer = make(tmp_path, None, lambda samplers, step: figures(heldout=step, trained=1.0 if step == 4 else 0.0))
    trainer.reward_p999 = highest
    trainer.run()
    alarms = (tmp_path / "alarms.txt").read_text()
    assert ("step 4: the mean reward 1.00 is above the teacher's 99.9th percentile" in alarms) == said
    assert said or alarms == ""
