"""A RATS run from its teacher to its bundle: opens everything, trains, measures, and writes what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from rewards.interface import said
from student.bundle import ImageSize, Latents
from student.families.family import Family
from student.families.find import open_family
from training import environment, figures
from training.config import ConfigError
from training.drawing import Painter
from training.evaluate import DIVERSITY_SEEDS, Evaluation, Measure, cached, fingerprint
from training.instruments import (
    CACHE,
    HELDOUT,
    TRAINED,
    Scale,
    calibration,
    measure_with,
    open_instruments,
    try_out,
)
from training.probe import pictures
from training.processes import state
from training.progress import console
from training.prompts import Prompts, cut_lines, from_files
from training.rats.preset import RatsConfig
from training.rats.trainer import Trainer, World
from training.result import Outcome, write
from training.rundir import FINISHED

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64
TRIED_PICTURES = 2
VALIDATION_SEED, WATCHED_PROMPTS, WATCHED_PICTURES = 1_000_000, 32, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it trains; ``model`` becomes the student."""

    config: RatsConfig
    model: Family
    latents: Latents
    prompts: Prompts
    measure: Measure
    scale: Scale
    reward_p999: float

    @property
    def image(self) -> ImageSize:
        """The size of what is drawn."""
        config = self.config
        return ImageSize(config.height_px, config.width_px, config.frames if self.latents.frames else None)

    def painter(self, model: Family, label: str, nfe: int) -> Painter:
        """The teacher (guided as configured) or the student at ``nfe`` steps."""
        guidance = self.config.guidance if label == "teacher" else 1.0
        return Painter(model, model.sigmas(nfe, self.latents.shape), guidance)

    def key(self) -> str:
        """What figures depend on beside the model: the rewards."""
        return "".join(one.source for one in self.scale.instruments)


def run(setup: Setup, out: Path) -> None:
    """Train (or go on), evaluate, write the bundle, and mark the run as finished."""
    config = setup.config
    environment.write(out / "run" / "environment.json")
    trainer = Trainer(config, setup.model, world(setup, out / "run"), out / "run")
    trainer.run()
    table, pictures = evidence(setup, trainer)
    trainer.networks.gather(keep=trainer.is_first)
    if trainer.is_first:
        trainer.networks.merge(out / "adapter")
        write(out, Outcome(config, setup.model, setup.latents, setup.image, setup.scale, table, pictures))
        (out / "run" / FINISHED).write_text("")
        (out / "run" / "checkpoint.pt").unlink(missing_ok=True)
        console.print(f"the student is in {out}; its card is {out / 'README.md'}")


def prepare(config: RatsConfig) -> Setup:
    """Open the teacher and the rewards, and calibrate the rewards on the teacher.

    Raises:
        BundleError: the model is no diffusers pipeline of a supported class.
        RewardError: a reward that does not exist or cannot be used so.
        ConfigError: prompts that cannot be used.
        SizeError: a picture size that the model cannot draw.
    """
    prompts = _prompts(config)
    device = _device(config)
    options = {"max_tokens": config.max_tokens} if config.max_tokens else {}
    model = open_family(config.model, DTYPES[config.weights], **options)
    latents = model.geometry(config.height_px, config.width_px, config.frames)
    model.to(device)
    _warn_of_cut(config, model)
    learns = config.reward_weight > 0
    rewards = open_instruments(config.reward, config.heldout, model, learns, device)
    tried, _ = pictures(TRIED_PICTURES, config.height_px, config.width_px)
    try_out(rewards, tried, prompts.calibration[:1] * TRIED_PICTURES, learns)
    measure = measure_with(rewards, model, prompts.judge)
    if prompts.known is not None:
        model.remember(["", *prompts.known])
    teacher = Painter(model, model.sigmas(config.reference_nfe, latents.shape), config.guidance)
    texts = prompts.calibration
    key = fingerprint(teacher, texts, "calibration" + "".join(one.source for one in rewards))
    base = cached(CACHE, key, lambda: measure.evaluate("calibration", teacher, texts, 2, latents.shape))
    scale = Scale(rewards, {one.name: calibration(one.asked, base.scores[one.name]) for one in rewards})
    highest = float(np.percentile(scale.standardised(base, TRAINED), 99.9))
    return Setup(config, model, latents, prompts, measure, scale, highest)


def _device(config: RatsConfig) -> str:
    """This process's GPU where there is one; a named device is taken as it is.

    Raises:
        ConfigError: there is no such device here.
    """
    if config.device == "auto":
        return str(state().device) if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=config.device).tolist()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ConfigError(f"device is {config.device!r}, which cannot be used here: {said(error)}") from error
    return config.device


def _prompts(config: RatsConfig) -> Prompts:
    """The starter world's, or those of a file; a run under SHORT_RUN_STEPS is not worth all of them."""
    short = SHORT_RUN_PROMPTS if config.steps < SHORT_RUN_STEPS else None
    if config.prompts == "shapes":
        from training.shapes.prompts import source

        return source(config.seed).first(short)
    measuring = Path(config.measuring_prompts) if config.measuring_prompts else None
    return from_files(Path(config.prompts), measuring, config.seed).first(short)


def _warn_of_cut(config: RatsConfig, model: Family) -> None:
    """Say which prompts of the run's files the model does not read to their end."""
    for name in {config.prompts, config.measuring_prompts} - {"", "shapes"} if state().is_main_process else ():
        if lines := cut_lines(model, Path(name)):
            sentence = f"{name}: {lines} have more than the {model.max_tokens} tokens that the model reads, and are cut"
            console.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False)


def world(setup: Setup, run_dir: Path) -> World:
    """What the trainer needs; ``setup.model`` must still be the teacher."""
    reward = partial(setup.scale.score, TRAINED)
    validate = partial(_validate, setup, run_dir)
    diversity = _teacher_diversity(setup) if setup.config.min_diversity or setup.config.steer else 0.0
    return World(setup.prompts.train, reward, validate, setup.latents.shape, setup.reward_p999, diversity)


def _teacher_diversity(setup: Setup) -> float:
    """The teacher's, at its full step count, on the prompts and seeds on which the student's is watched."""
    painter = setup.painter(setup.model, "teacher", setup.config.reference_nfe)
    varied, seeds = _watched(setup)

    def measure() -> Evaluation:
        images = painter.draw(varied, seeds, setup.latents.shape, setup.config.draw_batch)
        diversity = setup.measure.diversity(images)
        return Evaluation("watched", len(painter.sigmas), painter.guidance, {}, {}, diversity)

    return float(np.mean(cached(CACHE, fingerprint(painter, varied, "watched"), measure).diversity))


def _watched(setup: Setup) -> tuple[list[str], list[int]]:
    """The prompts, each several times, and the seeds on which diversity is watched while a run trains."""
    varied = [text for text in setup.prompts.validation[:WATCHED_PROMPTS] for _ in range(DIVERSITY_SEEDS)]
    return varied, [2 * VALIDATION_SEED + i for i in range(len(varied))]


@torch.no_grad()
def _validate(setup: Setup, run_dir: Path, painters: Sequence[Painter], step: int) -> dict[str, float]:
    """The student on the validation prompts, the mean over its step counts; leaves a grid of pictures behind."""
    rows: list[dict[str, float]] = []
    shown: dict[str, Tensor] = {}
    for painter in painters:
        images, row = _look(setup, painter)
        rows.append(row)
        shown[f"{len(painter.sigmas)} steps, after {step}"] = images[:WATCHED_PICTURES]
    if state().is_main_process:
        (run_dir / "grids").mkdir(parents=True, exist_ok=True)
        figures.grid(shown, run_dir / "grids" / f"{step:06d}.png")
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _look(setup: Setup, painter: Painter) -> tuple[Tensor, dict[str, float]]:
    """Pictures of the validation prompts, and what is logged of them."""
    texts, shape, batch = setup.prompts.validation, setup.latents.shape, setup.config.draw_batch
    images = painter.draw(texts, [VALIDATION_SEED + i for i in range(len(texts))], shape, batch)
    watched = texts[:WATCHED_PROMPTS]
    others = painter.draw(*_watched(setup), shape, batch)
    noise = torch.randn(len(watched), *shape, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    velocities = painter.trajectory(noise.to(painter.model.device), watched).v
    return images, {
        "reward_validation": float(setup.scale.score(TRAINED, images, texts).mean()),
        "heldout_validation": float(setup.scale.score(HELDOUT, images, texts).mean()),
        "diversity_validation": float(np.mean(setup.measure.diversity(others))),
        "saturation": float(((images < 0.01) | (images > 0.99)).float().mean()),
        "velocity_norm": float(torch.stack([v.square().mean().sqrt() for v in velocities]).mean()),
    }


def evidence(setup: Setup, trainer: Trainer) -> tuple[list[Evaluation], dict[str, Tensor]]:
    """The test prompts' figures of the teacher at its reference and at the student's step counts, and of the student;
    and the same eight prompts and seeds drawn by each, for the card.
    """
    teachers = dict.fromkeys((setup.config.reference_nfe, *setup.config.nfe))
    wanted = [("teacher", nfe) for nfe in teachers] + [("student", nfe) for nfe in setup.config.nfe]
    shown = setup.prompts.test[:WATCHED_PICTURES]
    table, pictures = [], {}
    for label, nfe in wanted:
        with trainer.networks.role("start" if label == "teacher" else "student") as model:
            painter = setup.painter(model, label, nfe)
            table.append(measured(setup, painter, label))
            pictures[f"{label}, {nfe} steps"] = painter.draw(shown, list(range(len(shown))), setup.latents.shape)
    return table, pictures


def measured(setup: Setup, painter: Painter, label: str) -> Evaluation:
    """One row of the evidence; kept by weights, prompts and rewards, so that a teacher is measured once."""
    test, config = setup.prompts.test, setup.config
    varied = 8 if config.steps < SHORT_RUN_STEPS else config.diversity_prompts
    console.print(f"evaluating the {label} at {len(painter.sigmas)} steps on {len(test)} prompts")
    key = fingerprint(painter, test, f"{label}{varied}{setup.key()}")
    make = partial(setup.measure.evaluate, label, painter, test, varied, setup.latents.shape)
    return cached(CACHE, key, make)
