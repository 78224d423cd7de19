"""One step of RATS in closed form, on the network of one number, with every setting of its loss and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student.schedule import sigmas
from tests.training.rats import test_wiring
from tests.training.rats.test_wiring import figures, make
from training.rats.trainer import Trainer

STUDENT, AVERAGE = 0.8, -0.4
C = torch.tensor([0.01, 0.02], dtype=torch.double).view(2, 1, 1, 1)  # of the prompts "x" and "xx"
PLAIN = {
    "student.nfe": (3,), "teacher.nfe": 5, "teacher.guided_steps": 0, "shaping.alpha": 1.0, "gate.tau": 0.25,
    "shaping.l2_weight": 0.3, "shaping.cosine_weight": 2.0,
}  # fmt: skip
GRID, THEIRS = sigmas(3), sigmas(5)
HORIZONS = {"student": (*GRID[1:], 0.0), "end": (0.0,), "0.9,0.45": (0.9, 0.45)}


def of(folder: Path, settings: dict[str, Any], validate: Any = None) -> Trainer:
    trainer = make(folder, {**PLAIN, **settings}, validate)
    for name, value in (("student", STUDENT), ("teacher", AVERAGE)):
        with trainer.roles.role(name) as model:
            model.transformer.w.data.fill_(value)
    return trainer


def walk(x: Tensor, grid: Sequence[float], w: Any, through: float = 1.0, since: int = 0) -> list[tuple[Tensor, Tensor]]:
    """States and the velocities that leave them; ``through`` is the share of the gradient that a state lets through,
    and steps before ``since`` are constants.
    """
    found = []
    for i, (at, after) in enumerate(zip(grid, [*grid[1:], 0.0], strict=True)):
        seen = x.detach() + through * (x - x.detach())
        v = (w if i >= since else w.detach()) * seen + C
        found.append((x, v))
        x = x + (after - at) * v
    return [*found, (x, torch.zeros_like(x))]


def data(path: Sequence[tuple[Tensor, Tensor]], grid: Sequence[float], sigma: float) -> Tensor:
    """What a path predicts at ``sigma`` by the step that leaves it, or passes through it."""
    if sigma == 0:
        return path[-1][0]
    at = max(i for i, one in enumerate(grid) if one >= sigma)
    x, v = path[at]
    return x + (sigma - grid[at]) * v - sigma * v


def expected(trainer: Trainer, noise: Tensor, w: Tensor, through: float = 1.0, since: int = 0) -> Tensor:
    """The loss by its definition, in double precision."""
    config = trainer.config
    ours, theirs = walk(noise, GRID, w, through, since), walk(noise, THEIRS, AVERAGE)
    reward_S, reward_T = (path[-1][0].flatten(1).mean(1) for path in (ours, theirs))
    distance = []
    for sigma in HORIZONS[config.shaping.horizons]:
        a, b = (data(path, grid, sigma).flatten(1) for path, grid in ((ours, GRID), (theirs, THEIRS)))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        distance.append(
            config.shaping.l2_weight * (a - b).square().mean(1) + config.shaping.cosine_weight * (1 - cosine)
        )
    excess = []
    for at, sigma in enumerate(GRID):
        step = max(i for i, one in enumerate(THEIRS) if one >= sigma)
        ratio = ours[at][1].flatten(1).norm(dim=1) / theirs[step][1].flatten(1).norm(dim=1)
        excess.append((ratio - config.shaping.velocity_hinge).clamp(min=0))
    gate = torch.sigmoid((reward_T - reward_S).detach() / config.gate.tau)
    shaped = gate * torch.stack(distance).mean(0) + torch.stack(excess).mean(0)
    rewarded = config.reward.weight * reward_S.clamp(max=config.reward.hinge)
    return (config.shaping.alpha * shaped - rewarded).mean()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"shaping.alpha": 7.0},
    "weight of the reward": {"reward.weight": 0.4},
    "no reward": {"reward.weight": 0.0},
    "hinge": {"reward.hinge": 0.0},
    "velocity hinge": {"shaping.velocity_hinge": 0.5, "shaping.alpha": 3.0},
    "velocity hinge at one horizon": {"shaping.velocity_hinge": 0.5, "shaping.horizons": "end"},
    "one horizon": {"shaping.horizons": "end"},
    "horizons by hand": {"shaping.horizons": "0.9,0.45"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_and_its_gradient_are_what_the_settings_say(name: str, tmp_path: Path) -> None:
    trainer = of(tmp_path, SETTINGS[name])
    [batch] = trainer.method.teach(trainer._batches(3))
    w = torch.tensor(STUDENT, dtype=torch.double, requires_grad=True)
    wanted = expected(trainer, batch.noise_BCHW.double(), w)
    (slope,) = torch.autograd.grad(wanted, w)
    done = trainer.method.step(batch)
    done.backward()
    assert done.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert float(trainer.roles.model.transformer.w.grad) == pytest.approx(slope.item(), rel=1e-3)


GRADIENTS: dict[str, tuple[dict[str, Any], float, int]] = {
    "full": ({}, 1.0, 0),
    "last 2": ({"gradient.last_k": 2, "gradient.mode": "last_k"}, 1.0, 1),
    "last": ({"gradient.last_k": 1, "gradient.mode": "last_k"}, 1.0, 2),
    "detached": ({"gradient.mode": "detached"}, 0.0, 0),
    "a bridge": ({"gradient.mode": "detached", "gradient.bridge": 0.3}, 0.3, 0),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_step_differentiates_as_much_of_the_rollout_as_it_is_told(name: str, tmp_path: Path) -> None:
    settings, through, since = GRADIENTS[name]
    trainer = of(tmp_path, settings)
    [batch] = trainer.method.teach(trainer._batches(3))
    w = torch.tensor(STUDENT, dtype=torch.double, requires_grad=True)
    wanted = expected(trainer, batch.noise_BCHW.double(), w, through, since)
    (slope,) = torch.autograd.grad(wanted, w)
    done = trainer.method.step(batch)
    done.backward()
    assert done.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert float(trainer.roles.model.transformer.w.grad) == pytest.approx(slope.item(), rel=1e-3)


def test_a_steered_alpha_weighs_the_loss_and_outlives_a_checkpoint(tmp_path: Path) -> None:
    trainer, again = (of(tmp_path / name, {"shaping.steer": 0.5}) for name in ("one", "other"))
    [batch] = trainer.method.teach(trainer._batches(3))
    before = trainer.method.step(batch)
    trainer.method.after_validation(2.0, 4.8)  # 0.5 * 4.8 = 2.4 is wanted, which is 1.2 times as much
    after = trainer.method.step(batch)
    again.method.load_state(trainer.method.state())
    resumed = again.method.step(batch)
    shaped = before.loss.item() + float(before.log["reward_student"])
    assert after.log["alpha"] == pytest.approx(1.2**10) and resumed.log["alpha"] == after.log["alpha"]
    assert after.loss.item() == pytest.approx(1.2**10 * shaped - float(before.log["reward_student"]), rel=1e-4)
    assert resumed.loss.item() == pytest.approx(after.loss.item())


@pytest.mark.parametrize("mode", ["full", "last_k", "detached", "low_variance"])
@pytest.mark.parametrize("method", ["rats", "tune", "consistency", "matching"])
def test_networks_decoder_and_backward_pass_are_in_the_runs_precision(method: str, mode: str, tmp_path: Path) -> None:
    """Also where a step is run again in its backward pass; the reward sees fp32 whatever was decoded."""
    settings = {"compute.precision": "bf16", "method": method, "gradient.mode": mode, "teacher.guided_steps": 0}
    trainer = make(tmp_path, settings)
    model, decoded, scored = trainer.roles.model, [], []

    def decode(x: Tensor) -> Tensor:
        decoded.append(torch.is_autocast_enabled("cpu"))
        return x.bfloat16()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scored.append(images.dtype)
        return test_wiring.reward(images, prompts).bfloat16()

    model.decode = decode
    if method in ("rats", "tune"):
        trainer.method._reward_of = reward  # type: ignore[attr-defined]
    asked = test_wiring.step(trainer, 3)
    assert {call.autocast for call in asked} == {True} and set(decoded) <= {True} and set(scored) <= {torch.float32}
    assert bool(decoded) == bool(scored) == (method in ("rats", "tune"))


def test_without_a_weight_a_reward_is_asked_without_gradient(tmp_path: Path) -> None:
    """It may be slow, and large: nothing of it is kept."""
    seen: list[bool] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(torch.is_grad_enabled() and images.requires_grad)
        return test_wiring.reward(images, prompts)

    for weight in (0.0, 0.5):
        trainer = of(tmp_path / str(weight), {"reward.weight": weight})
        trainer.method._reward_of = reward  # type: ignore[attr-defined]
        [batch] = trainer.method.teach(trainer._batches(3))
        trainer.method.step(batch)
    assert seen == [False, False, False, True], "the teacher's, and the student's"


def test_a_steps_figures_are_means_over_its_micro_batches_and_count_all_samples(tmp_path: Path) -> None:
    trainer = of(tmp_path, {"optim.accumulate": 3})
    batches = trainer.method.teach(trainer._batches(2))
    alone = [trainer.method.step(batch) for batch in batches]
    losses, rewards = [one.loss.item() for one in alone], [float(one.log["reward_student"]) for one in alone]
    log = trainer._step(2)
    assert log["loss"] == pytest.approx(sum(losses) / 3) and len(set(losses)) == 3
    assert log["reward_student"] == pytest.approx(sum(rewards) / 3)
    trainer.processes._state = type("Two", (), {"num_processes": 2, "process_index": 1})  # type: ignore[assignment]
    trainer.processes.mean = lambda values: dict(values)  # type: ignore[method-assign]
    trainer.processes.mean_gradients = lambda *given: None  # type: ignore[method-assign]
    assert trainer._step(4)["samples"] == 5 * 2 * 3 * 2, "steps, samples, micro-batches, processes"


def test_a_step_that_is_skipped_leaves_the_methods_state_as_it_was(tmp_path: Path) -> None:
    trainer = of(tmp_path, {"gate.tau_in_std": True})
    trainer._step(0)
    before = trainer.method.state()
    assert before["gap_std"] is not None
    own = trainer.method._reward_of  # type: ignore[attr-defined]
    trainer.method._reward_of = lambda images, prompts: own(images, prompts) * math.nan  # type: ignore[attr-defined]
    assert trainer._step(1)["skipped"] == 1.0 and trainer.method.state() == before and trainer.bad_steps == 1
    trainer.method._reward_of = own  # type: ignore[attr-defined]
    assert "skipped" not in trainer._step(2) and trainer.bad_steps == 0
    assert trainer.method.state()["gap_std"] != before["gap_std"]


@pytest.mark.parametrize("guided_steps", [0, 2, 9])
def test_the_frozen_start_leaves_the_device_when_no_step_asks_it_any_more(guided_steps: int, tmp_path: Path) -> None:
    """After its phase; at once where a run resumes after that; and it comes back for what is measured of it."""

    def moves(trainer: Trainer) -> list[str]:
        seen: list[str] = []
        trainer.roles._start.to = lambda device: seen.append(f"{device} at {len(done)}")
        own = trainer._step
        done: list[int] = []
        trainer._step = lambda step: (own(step), done.append(step))[0]  # type: ignore[method-assign]
        trainer.run()
        with trainer.roles.role("start"):
            pass
        return seen

    settings = {"teacher.guided_steps": guided_steps}
    found = moves(make(tmp_path, settings, lambda samplers, step: figures()))
    back = [f"cpu at {step}" for step in range(min(guided_steps, 4))]  # the device of this network is the CPU
    assert found == [*back, *([f"cpu at {guided_steps}"] if guided_steps < 4 else []), "cpu at 4"]
    longer = make(tmp_path, {**settings, "steps": 6}, lambda samplers, step: figures())
    again = moves(longer)
    assert again == [*(["cpu at 0", "cpu at 1"] if guided_steps == 9 else ["cpu at 0"]), "cpu at 2"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_steps_gradient_is_the_mean_over_its_micro_batches(accumulate: int, tmp_path: Path) -> None:
    trainer, own = (of(tmp_path / name, {"optim.accumulate": accumulate}) for name in ("one", "other"))
    slopes = []
    for batch in own.method.teach(own._batches(2)):
        own.method.step(batch).backward()
        slopes.append(float(own.roles.model.transformer.w.grad))
        own.roles.model.transformer.w.grad = None
    assert len(set(slopes)) == accumulate
    assert trainer._step(2)["grad_norm"] == pytest.approx(abs(sum(slopes) / accumulate), rel=1e-5)


def test_gradients_are_averaged_over_processes_after_the_last_micro_batch_alone(tmp_path: Path) -> None:
    trainer = of(tmp_path, {"optim.accumulate": 3})
    done: list[Any] = []
    own = trainer.method.step
    trainer.roles.reduce = done.append  # type: ignore[method-assign]
    trainer.method.step = lambda batch: (done.append(batch.at), own(batch))[1]  # type: ignore[method-assign]
    trainer._step(2)
    assert done == [False, 0, False, 2, True, 4]


def test_what_is_kept_is_decided_by_the_first_process(tmp_path: Path) -> None:
    """Here the last bits of a score say something else."""
    trainer = make(tmp_path, None, lambda samplers, step: figures(heldout=float(step)))
    trainer.processes.from_first = lambda values: {**values, "heldout_validation": -values["heldout_validation"]}  # type: ignore[method-assign]
    trainer.run()
    assert (trainer.best_at, trainer.best_score) == (0, 0.0)


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", {"compute.save_minutes": 1e-9})
    trainer.processes._state = type("Second", (), {"num_processes": 1, "process_index": 0, "is_main_process": False,
                                                   "wait_for_everyone": lambda *_: None})()  # fmt: skip
    trainer.run()
    assert trainer.best_at == 0 and not (tmp_path / "run").exists()
