"""The measurements of a RATS run: the student while it trains, and teacher and student on the test prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from student.families.family import Family
from training import evaluate, figures
from training.disk import unless_full
from training.evaluate import Evaluation, Plan, cached, fingerprint, hash_model, in_turns, over_pictures
from training.experiment.setup import SHORT_RUN_STEPS, Setup
from training.processes import state
from training.progress import console
from training.rats.trainer import Trainer
from training.sampler import Sampler
from training.scorers import HELDOUT, TRAINED, move, sources

VALIDATION_SEED, SHOWN_PICTURES = 1_000_000, 8


def trainer(setup: Setup, run_dir: Path) -> Trainer:
    """The trainer of a run, with validation as the configuration says; the device has the rewards that a step asks."""
    validation, shaping = setup.config.validation, setup.config.shaping
    _put_aside(setup)
    return Trainer(
        setup.config,
        setup.roles,
        run_dir,
        prompts=setup.prompts.train,
        reward=setup.reward.score,
        validate=partial(_validate, setup, run_dir),
        latent_shape=setup.latents.shape,
        reward_p999=setup.reward_p999,
        second=setup.rewards[HELDOUT].score,
        teacher_diversity=_teacher_diversity(setup) if validation.min_diversity or shaping.steer else 0.0,
    )


def _teacher_diversity(setup: Setup) -> float:
    """The teacher's, at its full step count, on the prompts and seeds that the student is validated on."""
    sampler, plan = setup.sampler(setup.model, "teacher", setup.config.teacher.reference_nfe), _plan(setup)
    plan = replace(plan, prompts=[])

    def measure() -> Evaluation:
        return Evaluation(
            "watched", len(sampler.sigmas), sampler.guidance, {}, {}, setup.measure.diversity(sampler, plan)
        )

    key = fingerprint(setup.teacher, sampler, plan, "watched")
    with setup.roles.role("start"):
        return float(np.mean(cached(evaluate.CACHE, key, measure).diversity))


def _plan(setup: Setup) -> Plan:
    """What each validation of a run generates."""
    texts, config = setup.prompts.validation, setup.config
    varied = min(8, config.data.validation_diversity) if config.steps < SHORT_RUN_STEPS else None
    plan = setup.plan(texts, texts[: varied or config.data.validation_diversity])
    return replace(plan, first_seed=VALIDATION_SEED, varied_seed=2 * VALIDATION_SEED)


@torch.no_grad()
def _validate(setup: Setup, run_dir: Path, samplers: Sequence[Sampler], step: int) -> dict[str, float]:
    """The student on the validation prompts, averaged over its step counts; also writes a grid of pictures."""
    rows: list[dict[str, float]] = []
    shown: dict[str, Tensor] = {}
    held_out = {HELDOUT: setup.rewards[HELDOUT]}
    move(held_out, str(setup.model.device))
    for sampler in samplers:
        with setup.roles.rollouts():
            images, row = _validated(setup, sampler)
        rows.append(row)
        shown[f"{len(sampler.sigmas)} steps, after {step}"] = images
    _put_aside(setup)
    if state().is_main_process:
        with unless_full("a grid of pictures", path := run_dir / "grids" / f"{step:06d}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.grid(shown, path)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _put_aside(setup: Setup) -> None:
    """Move the rewards that no step asks to main memory."""
    asked = (TRAINED, HELDOUT) if setup.config.gate.kind == "disagreement" else (TRAINED,)
    move({role: reward for role, reward in setup.rewards.items() if role not in asked}, "cpu")


def _validated(setup: Setup, sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
    """The first pictures of the validation prompts, and the figures over all of them."""
    plan = _plan(setup)

    def measured(at: int, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[float], list[float], float]:
        trained, heldout = (setup.rewards[role].score(images, prompts).tolist() for role in (TRAINED, HELDOUT))
        saturated = float(((images < 0.01) | (images > 0.99)).float().mean()) * len(images)
        return figures.still(images[: max(0, SHOWN_PICTURES - at)]), trained, heldout, saturated

    found = over_pictures(sampler, plan.prompts, plan.seeds(), plan.shape, plan.batch, measured)
    shown, trained, heldout, saturated = zip(*found, strict=True)
    spread = setup.measure.diversities(sampler, plan)
    return torch.cat(shown), {
        "reward_validation": _mean(trained),
        "heldout_validation": _mean(heldout),
        **{f"{name}_validation": float(np.mean(values)) for name, values in spread.items()},
        "saturation": sum(saturated) / len(plan.prompts),
        "velocity_norm": _velocity_norm(sampler, plan),
    }


def _mean(parts: Sequence[Sequence[float]]) -> float:
    return float(torch.tensor([value for part in parts for value in part]).mean())


def _velocity_norm(sampler: Sampler, plan: Plan) -> float:
    """The root mean square of the velocity, averaged over the steps, on the prompts used for diversity."""
    texts = plan.varied
    noise = torch.randn(len(texts), *plan.shape, generator=torch.Generator().manual_seed(plan.first_seed))

    def squares(at: int) -> list[float]:
        part = slice(at, at + plan.batch)
        path = sampler.trajectory(noise[part].to(sampler.model.device), texts[part])
        return [float(v.square().mean()) * len(texts[part]) for v in path.v]

    by_step = zip(*in_turns(range(0, len(texts), plan.batch), squares), strict=True)
    return float(np.mean([math.sqrt(sum(step) / len(texts)) for step in by_step]))


def test_figures(setup: Setup, model: Family, label: str, nfe: int) -> tuple[Evaluation, Tensor]:
    """The figures on the test prompts, and the pictures of the first eight for the card."""
    sampler = setup.sampler(model, label, nfe)
    row = measured_on_test(setup, sampler, label)
    texts, shape = setup.prompts.test[:SHOWN_PICTURES], setup.latents.shape

    def kept(_: int, images: Tensor, __: Sequence[str]) -> Tensor:
        return figures.still(images)

    batch = setup.config.validation.batch
    return row, torch.cat(over_pictures(sampler, texts, range(len(texts)), shape, batch, kept))


def measured_on_test(setup: Setup, sampler: Sampler, label: str) -> Evaluation:
    """One row of figures on the test prompts; cached by weights, prompts and rewards: a teacher is measured once."""
    test, config = setup.prompts.test, setup.config
    varied = 8 if config.steps < SHORT_RUN_STEPS else config.data.test_diversity
    if state().is_main_process:
        console.print(f"evaluating the {label} at {len(sampler.sigmas)} steps on {len(test)} prompts")
    plan = setup.plan(test, test[:varied])
    weights = setup.teacher if label == "teacher" else setup.teacher + hash_model(sampler.model)
    key = fingerprint(
        weights, sampler, plan, label + config.reward.weights + sources(setup.rewards) + setup.measure.version
    )
    return cached(evaluate.CACHE, key, lambda: setup.measure.evaluate(label, sampler, plan))
