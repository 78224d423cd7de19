"""One training step as its parts saw it: who was asked what, with which noise, guidance, grid, types and rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.training.shapes import small
from training.config import changed
from training.features import latent_features
from training.rats.config import RatsConfig
from training.rats.loss import shaping
from training.rats.method import Batch
from training.rats.peers import Consistency, Matching, data_of
from training.rats.rats import Rats
from training.rats.roles import Roles
from training.rats.trainer import Trainer
from training.rats.trajectory import rollout
from training.sampler import Sampler, velocity_of
from training.steplog import read_log

PROMPTS, NEGATIVE = ["a red heart", "a blue star"], "a green ring"
GUIDED_STEPS, EMA = 2, 0.75


@dataclass
class Call:
    """One call of the transformer; ``negative``: its first row is of the negative prompt."""

    step: int
    role: str
    sigma: float
    x: Tensor
    negative: bool
    bf16: bool
    gradient: bool


@dataclass
class Seen:
    """What happened, in order; ``step`` is that of the last batch that was made."""

    step: int = -1
    role: str = "student"
    calls: list[Call] = field(default_factory=list)
    updates: list[tuple[int, float, float]] = field(default_factory=list)  # step, rate, gradient's norm at the update
    restarts: list[int] = field(default_factory=list)
    students: dict[int, Tensor] = field(default_factory=dict)


class RecordingRoles(Roles):
    seen: Seen

    @contextmanager
    def role(self, name: str) -> Iterator[Any]:
        before, self.seen.role = self.seen.role, name
        with super().role(name) as model:
            yield model
        self.seen.role = before

    def restart_teacher(self) -> None:
        self.seen.restarts.append(self.seen.step + 1)
        super().restart_teacher()


class RecordingFlux(Flux):
    seen: Seen

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: Any) -> Tensor:
        negative = torch.equal(condition.tokens_BLE[:1], self.encode([NEGATIVE]).tokens_BLE)
        seen, bf16 = self.seen, torch.is_autocast_enabled("cpu")
        gradient = torch.is_grad_enabled()
        seen.calls.append(Call(seen.step, seen.role, float(sigma), x.detach().clone(), negative, bf16, gradient))
        return super().velocity(x, sigma, condition)


def config_of(**changes: object) -> RatsConfig:
    base = {
        "steps": 4,
        "student.nfe": (2,),
        "teacher.nfe": 3,
        "teacher.guidance": 2.5,
        "teacher.negative_prompt": NEGATIVE,
        "teacher.guided_steps": GUIDED_STEPS,
        "teacher.ema": EMA,
        "optim.batch": 2,
        "optim.lr": 1e-3,
        "optim.warmup": 2,
        "optim.decay": 0.5,
        "optim.clip_norm": 1e-3,
        "validation.every": 1,
    }
    return changed(RatsConfig(), {**base, **changes})


def recording(config: RatsConfig, folder: Path) -> tuple[RecordingRoles, Seen]:
    if not (folder / "shapes-teacher").exists():
        small.write_models(folder)
    seen = Seen()
    model = RecordingFlux(open_pipeline(folder / "shapes-teacher"), max_tokens=12)
    roles = RecordingRoles(model, config.teacher.ema)
    model.seen = roles.seen = seen
    return roles, seen


def first(roles: Roles) -> Tensor:
    return roles.trainable[0].detach().clone()


def trained(config: RatsConfig, folder: Path, bad_step: int = -1) -> tuple[RecordingRoles, Seen, Tensor]:
    """A whole run; also the teacher's first parameter as the run leaves it. The reward fails at ``bad_step``."""
    roles, seen = recording(config, folder)

    def prompts(step: int, num: int) -> list[str]:
        seen.step = step
        return PROMPTS[:num]

    def reward(images_BCHW: Tensor, _: Sequence[str]) -> Tensor:
        return images_BCHW[:, 0].mean((1, 2)) * (torch.nan if seen.step == bad_step else 1.0)

    def validate(samplers: Sequence[Sampler], step: int) -> dict[str, float]:
        assert [sampler.precision for sampler in samplers] == [config.compute.precision]
        assert all(sampler.guidance == 1.0 for sampler in samplers)
        seen.students[step] = first(roles)
        names = ("diversity_validation", "reward_validation", "saturation", "velocity_norm")
        return {"heldout_validation": float(step), **dict.fromkeys(names, 1.0)}

    shape = roles.model.latent_shape(64, 64)
    run = Trainer(config, roles, folder / "run", prompts=prompts, reward=reward, validate=validate, latent_shape=shape)
    update = run.optimizer.step

    def step(*arguments: Any) -> Any:
        norm = torch.stack([p.grad.norm() for p in roles.trainable if p.grad is not None]).norm()
        seen.updates.append((seen.step, run.optimizer.param_groups[0]["lr"], float(norm)))
        return update(*arguments)

    run.optimizer.step = step  # type: ignore[method-assign]
    run.run()
    return roles, seen, roles._following[0].detach().clone()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # as training.progress.quiet does
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_asks_each_role_what_the_method_says(precision: str, tmp_path: Path) -> None:
    config = config_of(**{"compute.precision": precision})
    roles, seen, teacher = trained(config, tmp_path)
    shape = roles.model.latent_shape(64, 64)
    wanted = {nfe: list(roles.model.sigmas(nfe, shape)) for nfe in (2, 3)}
    starts = []
    for step in range(config.steps):
        calls = [call for call in seen.calls if call.step == step]
        ours = [call for call in calls if call.role == "student"]
        theirs = [call for call in calls if call.role != "student"]
        assert {call.role for call in theirs} == {"start" if step < GUIDED_STEPS else "teacher"}
        assert [call.sigma for call in ours] == pytest.approx(wanted[2])
        assert [call.sigma for call in theirs] == pytest.approx(wanted[3])
        guided = step < GUIDED_STEPS  # then one call has the negative prompt's rows, and the prompts' own after them
        assert {call.negative for call in theirs} == {guided}, "guided in the first phase alone"
        assert {len(call.x) for call in theirs} == {4 if guided else 2}
        assert not guided or all(torch.equal(*call.x.chunk(2)) for call in theirs)
        assert torch.equal(ours[0].x, theirs[0].x[-2:]), "both begin at the same noise"
        assert ours[0].x.shape == (2, *shape) and 0.8 < float(ours[0].x.std()) < 1.2
        assert all(call.gradient for call in ours) and not any(call.gradient for call in theirs)
        assert {call.bf16 for call in calls} == {precision == "bf16"}
        starts.append(ours[0].x)
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i]), "each step has its own noise"
    rates = [config.optim.lr * factor for factor in (0.5, 1.0, 1.0, 0.5)]  # warm-up over 2 steps, decay over the last 2
    assert [rate for _, rate, _ in seen.updates] == pytest.approx(rates)
    assert all(norm == pytest.approx(config.optim.clip_norm, rel=1e-2) for _, _, norm in seen.updates)
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "grad_norm" in row]
    assert len(rows) == 4 and all(row["grad_norm"] > config.optim.clip_norm for row in rows)
    assert seen.restarts == [GUIDED_STEPS]
    expected = seen.students[GUIDED_STEPS]  # the teacher begins anew as the student of that moment, then follows it
    for step in range(GUIDED_STEPS, config.steps):
        expected = EMA * expected + (1 - EMA) * seen.students[step + 1]
    torch.testing.assert_close(teacher, expected, atol=1e-7, rtol=1e-5)
    assert not torch.allclose(seen.students[GUIDED_STEPS], seen.students[config.steps])


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_distribution_matching_is_guided_away_from_the_negative_prompt(tmp_path: Path) -> None:
    config = config_of(**{"method": "matching", "compute.precision": "fp32", "reward.weight": 0.0, "steps": 1})
    _, seen, _ = trained(config, tmp_path)
    starts = [call for call in seen.calls if call.role == "start" and call.step == 0]
    assert starts and all(call.negative and len(call.x) == 4 for call in starts)


def test_the_second_phase_begins_after_a_skipped_step_too(tmp_path: Path) -> None:
    config = config_of(**{"compute.precision": "fp32"})
    _, seen, _ = trained(config, tmp_path, bad_step=GUIDED_STEPS - 1)
    assert [step for step, _, _ in seen.updates] == [0, 2, 3] and seen.restarts == [GUIDED_STEPS]
    assert {call.role for call in seen.calls if call.step >= GUIDED_STEPS} == {"student", "teacher"}


@pytest.mark.parametrize("weights", [(3.0, 0.0), (0.0, 2.0), (1.0, 0.5)])
def test_shaping_is_of_both_paths_from_one_noise_with_its_own_weights(
    weights: tuple[float, float], tmp_path: Path
) -> None:
    keys = ("shaping.l2_weight", "shaping.cosine_weight")
    config = config_of(**{"compute.precision": "fp32", **dict(zip(keys, weights, strict=True))})
    roles, seen = recording(config, tmp_path)
    grids = {nfe: roles.model.sigmas(nfe, roles.model.latent_shape(64, 64)) for nfe in (2, 3)}
    rats = Rats(config, roles, lambda images, _: images.mean((1, 2, 3)), grids)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    [batch] = rats.teach([Batch(0, 0, 2, PROMPTS, noise)])
    loss, _, log = rats.step(batch)
    model = roles.model
    with torch.no_grad():
        condition, negative = model.encode(PROMPTS), model.encode([NEGATIVE] * 2)
        ours = rollout(velocity_of(model, condition), noise, grids[2])
        theirs = rollout(velocity_of(model, condition, negative, config.teacher.guidance), noise, grids[3])
        points = (*grids[2][1:], 0.0)
        expected = []
        for sigma in points:
            a, b = (path.data(sigma).flatten(1) for path in (ours, theirs))
            cosine = torch.nn.functional.cosine_similarity(a, b)
            expected.append(weights[0] * (a - b).square().mean(1) + weights[1] * (1 - cosine))
        distance = torch.stack(expected).mean(0)
        torch.testing.assert_close(shaping(ours, theirs, points, *weights), distance)
        rewards = [model.decode(path.x[-1]).mean((1, 2, 3)) for path in (ours, theirs)]
        gate = torch.sigmoid((rewards[1] - rewards[0]) / config.gate.tau)
    assert log["shaping"] == pytest.approx(float(distance.mean()), rel=1e-4)
    assert loss.item() == pytest.approx(float((gate * distance - rewards[0]).mean()), rel=1e-4)
    assert seen.calls[0].role == "start"


def test_distribution_matching_moves_the_student_against_the_direction(tmp_path: Path) -> None:
    config = config_of(**{"compute.precision": "fp32", "method": "matching"})
    roles, _ = recording(config, tmp_path)
    grid = roles.model.sigmas(1, roles.model.latent_shape(64, 64))
    matching = Matching(config, roles, lambda images, _: images.mean((1, 2, 3)), {1: grid})
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    along = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    matching._direction = lambda *_: along  # type: ignore[method-assign]
    matching.step(Batch(0, 0, 1, PROMPTS, noise)).backward()
    found = [p.grad.clone() for p in roles.trainable if p.grad is not None]
    x0 = data_of(velocity_of(roles.model, roles.model.encode(PROMPTS)), noise, 1.0)
    expected = torch.autograd.grad((x0 * along).mean(), roles.trainable, allow_unused=True)
    for a, b in zip(found, [g for g in expected if g is not None], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-3)


def test_the_target_of_consistency_is_the_averages(tmp_path: Path) -> None:
    config = config_of(**{"compute.precision": "fp32", "method": "consistency", "teacher.nfe": 8, "student.nfe": (1,)})
    roles, seen = recording(config, tmp_path)
    grids = {nfe: roles.model.sigmas(nfe, roles.model.latent_shape(64, 64)) for nfe in (1, 8)}
    consistency = Consistency(config, roles, lambda images, _: images.mean((1, 2, 3)), grids)
    [batch] = consistency.teach([Batch(0, 0, 1, PROMPTS, torch.randn(2, 4, 8, 8))])
    assert {call.role for call in seen.calls} == {"start"}
    asked = []
    for at in range(4):  # another random point each time
        seen.calls.clear()
        consistency.step(Batch(0, at, 1, PROMPTS, batch.noise_BCHW, batch.teacher))
        asked.append({call.role for call in seen.calls})
    assert {"student", "teacher"} in asked and all(roles <= {"student", "teacher"} for roles in asked)


def test_diversity_is_of_the_autoencoders_own_range(tmp_path: Path) -> None:
    """Its encoder reads pictures in [-1, 1]."""
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.vae.encode(2 * images - 1).latents.flatten(1)
    torch.testing.assert_close(latent_features(model)(images), expected)
