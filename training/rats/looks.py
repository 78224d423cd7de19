"""What is measured of a RATS run: looks at the student while it trains, and the evidence at its end."""

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
from training import figures, instruments
from training.drawing import Painter
from training.evaluate import Evaluation, Plan, cached, fingerprint, hash_model, in_turns, looked_at
from training.instruments import HELDOUT, TRAINED
from training.processes import state
from training.progress import console
from training.rats.setup import SHORT_RUN_STEPS, Setup
from training.rats.trainer import World

VALIDATION_SEED, WATCHED_PICTURES = 1_000_000, 8


def world(setup: Setup, run_dir: Path) -> World:
    """What the trainer needs."""
    reward = partial(setup.scale.score, TRAINED)
    validate = partial(_validate, setup, run_dir)
    diversity = _teacher_diversity(setup) if setup.config.min_diversity or setup.config.steer else 0.0
    return World(setup.prompts.train, reward, validate, setup.latents.shape, setup.reward_p999, diversity)


def _teacher_diversity(setup: Setup) -> float:
    """The teacher's, at its full step count, on the prompts and seeds on which the student's is watched."""
    painter, plan = setup.painter(setup.model, "teacher", setup.config.reference_nfe), _validation(setup)
    plan = replace(plan, prompts=[])

    def measure() -> Evaluation:
        return Evaluation(
            "watched", len(painter.sigmas), painter.guidance, {}, {}, setup.measure.diversity(painter, plan)
        )

    key = fingerprint(setup.teacher, painter, plan, "watched")
    with setup.networks.role("start"):
        return float(np.mean(cached(instruments.CACHE, key, measure).diversity))


def _validation(setup: Setup) -> Plan:
    """What is drawn at each look of a run."""
    texts = setup.prompts.validation
    plan = setup.plan(texts, texts[: setup.config.watched_prompts])
    return replace(plan, first_seed=VALIDATION_SEED, varied_seed=2 * VALIDATION_SEED)


@torch.no_grad()
def _validate(setup: Setup, run_dir: Path, painters: Sequence[Painter], step: int) -> dict[str, float]:
    """The student on the validation prompts, the mean over its step counts; leaves a grid of pictures behind."""
    rows: list[dict[str, float]] = []
    shown: dict[str, Tensor] = {}
    for painter in painters:
        images, row = _look(setup, painter)
        rows.append(row)
        shown[f"{len(painter.sigmas)} steps, after {step}"] = images
    if state().is_main_process:
        (run_dir / "grids").mkdir(parents=True, exist_ok=True)
        figures.grid(shown, run_dir / "grids" / f"{step:06d}.png")
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _look(setup: Setup, painter: Painter) -> tuple[Tensor, dict[str, float]]:
    """The first pictures of the validation prompts, and what is logged of all of them."""
    plan = _validation(setup)

    def look(at: int, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[float], list[float], float]:
        trained, heldout = (setup.scale.score(role, images, prompts).tolist() for role in (TRAINED, HELDOUT))
        saturated = float(((images < 0.01) | (images > 0.99)).float().mean()) * len(images)
        return figures.still(images[: max(0, WATCHED_PICTURES - at)]), trained, heldout, saturated

    found = looked_at(painter, plan.prompts, plan.seeds(), plan.shape, plan.batch, look)
    shown, trained, heldout, saturated = zip(*found, strict=True)
    return torch.cat(shown), {
        "reward_validation": _mean(trained),
        "heldout_validation": _mean(heldout),
        "diversity_validation": float(np.mean(setup.measure.diversity(painter, plan))),
        "saturation": sum(saturated) / len(plan.prompts),
        "velocity_norm": _velocity_norm(painter, plan),
    }


def _mean(parts: Sequence[Sequence[float]]) -> float:
    return float(torch.tensor([value for part in parts for value in part]).mean())


def _velocity_norm(painter: Painter, plan: Plan) -> float:
    """The root mean square of the velocity, the mean over the steps, on the prompts whose diversity is watched."""
    texts = plan.varied
    noise = torch.randn(len(texts), *plan.shape, generator=torch.Generator().manual_seed(plan.first_seed))

    def squares(at: int) -> list[float]:
        part = slice(at, at + plan.batch)
        path = painter.trajectory(noise[part].to(painter.model.device), texts[part])
        return [float(v.square().mean()) * len(texts[part]) for v in path.v]

    steps = zip(*in_turns(range(0, len(texts), plan.batch), squares), strict=True)
    return float(np.mean([math.sqrt(sum(step) / len(texts)) for step in steps]))


def evidence(setup: Setup, model: Family, label: str, nfe: int) -> tuple[Evaluation, Tensor]:
    """The test prompts' figures, and the first eight prompts and seeds drawn for the card."""
    painter = setup.painter(model, label, nfe)
    row = measured(setup, painter, label)
    texts, shape = setup.prompts.test[:WATCHED_PICTURES], setup.latents.shape

    def look(_: int, images: Tensor, __: Sequence[str]) -> Tensor:
        return figures.still(images)

    return row, torch.cat(looked_at(painter, texts, range(len(texts)), shape, setup.config.draw_batch, look))


def measured(setup: Setup, painter: Painter, label: str) -> Evaluation:
    """One row of the evidence; kept by weights, prompts and rewards, so that a teacher is measured once."""
    test, config = setup.prompts.test, setup.config
    varied = 8 if config.steps < SHORT_RUN_STEPS else config.diversity_prompts
    if state().is_main_process:
        console.print(f"evaluating the {label} at {len(painter.sigmas)} steps on {len(test)} prompts")
    plan = setup.plan(test, test[:varied])
    weights = setup.teacher if label == "teacher" else setup.teacher + hash_model(painter.model)
    key = fingerprint(weights, painter, plan, label + "".join(one.source for one in setup.scale.instruments))
    return cached(instruments.CACHE, key, lambda: setup.measure.evaluate(label, painter, plan))
