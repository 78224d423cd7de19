"""A RATS run from its teacher to its bundle: opens everything, trains, measures, and writes what it found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import figures
from training.drawing import Painter
from training.evaluate import DIVERSITY_SEEDS, Evaluation, cached, fingerprint
from training.progress import console
from training.rats.preset import RatsConfig
from training.rats.trainer import Trainer, World
from training.rundir import FINISHED
from training.shapes import prompts
from training.shapes.instruments import CACHE, Instruments, Opened, instruments, open_model
from training.shapes.result import Calibration, Outcome, write

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64
VALIDATION_SEED, WATCHED_PROMPTS, WATCHED_PICTURES = 1_000_000, 16, 8


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it trains; ``opened.model`` becomes the student."""

    config: RatsConfig
    opened: Opened
    instruments: Instruments
    calibration: dict[str, Calibration]
    reward_p999: float
    teacher: Painter

    @property
    def num_prompts(self) -> int | None:
        """How many validation and test prompts are used; None is all. A short run is not worth them all."""
        return SHORT_RUN_PROMPTS if self.config.steps < SHORT_RUN_STEPS else None

    def painter(self, teacher: bool, nfe: int) -> Painter:
        """The teacher (guided as configured) or the student at ``nfe`` steps."""
        model = self.teacher.model if teacher else self.opened.model
        grid = model.sigmas(nfe, self.opened.latents.shape)
        return Painter(model, grid, self.config.guidance if teacher else 1.0)

    def wanted(self) -> list[tuple[str, int]]:
        """The rows of the evidence: the teacher at its reference and the student's step counts, then the student."""
        teachers = dict.fromkeys((self.config.reference_nfe, *self.config.nfe))
        return [*(("teacher", nfe) for nfe in teachers), *(("student", nfe) for nfe in self.config.nfe)]


def run(config: RatsConfig, out: Path) -> None:
    """Train (or go on), evaluate, write the bundle, and mark the run as finished."""
    setup = prepare(config)
    trainer = Trainer(config, setup.opened.model, _world(setup, out / "run"), out / "run")
    trainer.run()
    opened, table = setup.opened, evaluate(setup)
    write(out, Outcome(config, opened.pipe, opened.latents, opened.image, setup.calibration, table, pictures(setup)))
    (out / "run" / FINISHED).write_text("")
    (out / "run" / "checkpoint.pt").unlink(missing_ok=True)
    console.print(f"the student is in {out}; its card is {out / 'README.md'}")


def prepare(config: RatsConfig) -> Setup:
    """Open the teacher and the scorers, and calibrate the scorers on the teacher.

    Raises:
        BundleError: the model's folder holds no diffusers pipeline.
    """
    opened = open_model(Path(config.model))
    tools = instruments(opened, {"trained": Path(config.scorer), "heldout": Path(config.heldout)})
    shape = opened.latents.shape
    model = copy.deepcopy(opened.model)
    teacher = Painter(model, model.sigmas(config.reference_nfe, shape), config.guidance)
    texts = prompts.measuring_prompts()[0]
    key = fingerprint(teacher, texts, "calibration" + tools.key())
    base = cached(CACHE, key, lambda: tools.measure.evaluate("calibration", teacher, texts, 2, shape))
    calibration = {name: Calibration.of(base.scores[name], sha256) for name, sha256 in tools.sources.items()}
    highest = float(np.percentile(calibration["trained"].standardise(base.scores["trained"]), 99.9))
    return Setup(config, opened, tools, calibration, highest, teacher)


def _world(setup: Setup, run_dir: Path) -> World:
    config, trained = setup.config, setup.calibration["trained"]
    scorer = setup.instruments.measure.scorers["trained"]

    def reward(images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        return (scorer(images_BCHW, texts).float() - trained.mean) / trained.std

    def train_prompts(step: int, num: int) -> list[str]:
        return prompts.training_prompts(num, config.seed, step)

    validate = partial(_validate, setup, run_dir)
    return World(train_prompts, reward, validate, setup.opened.latents.shape, setup.reward_p999)


@torch.no_grad()
def _validate(setup: Setup, run_dir: Path, painters: Sequence[Painter], step: int) -> dict[str, float]:
    """The student on the validation prompts, the mean over its step counts; leaves a grid of pictures behind."""
    texts, shape = prompts.measuring_prompts()[1][: setup.num_prompts], setup.opened.latents.shape
    measure = setup.instruments.measure
    varied = [text for text in texts[:WATCHED_PROMPTS] for _ in range(DIVERSITY_SEEDS)]
    rows: list[dict[str, float]] = []
    shown: dict[str, Tensor] = {}
    for painter in painters:
        images = painter.draw(texts, [VALIDATION_SEED + i for i in range(len(texts))], shape)
        others = painter.draw(varied, [2 * VALIDATION_SEED + i for i in range(len(varied))], shape)
        row = {"diversity_validation": float(np.mean(measure.diversity(others)))}
        for name, column in (("trained", "reward_validation"), ("heldout", "heldout_validation")):
            raw = float(measure.scorers[name](images, texts).mean())
            row[column] = setup.calibration[name].standardise([raw])[0]
        row["saturation"] = float(((images < 0.01) | (images > 0.99)).float().mean())
        noise = torch.randn(len(texts[:WATCHED_PROMPTS]), *shape, generator=torch.Generator().manual_seed(step))
        path = painter.trajectory(noise, texts[:WATCHED_PROMPTS])
        row["velocity_norm"] = float(torch.stack([v.square().mean().sqrt() for v in path.v]).mean())
        rows.append(row)
        shown[f"{len(painter.sigmas)} steps, after {step}"] = images[:WATCHED_PICTURES]
    (run_dir / "grids").mkdir(parents=True, exist_ok=True)
    figures.grid(shown, run_dir / "grids" / f"{step:06d}.png")
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def evaluate(setup: Setup) -> list[Evaluation]:
    """The evidence on the test prompts."""
    return [evaluate_one(setup, label, nfe) for label, nfe in setup.wanted()]


def evaluate_one(setup: Setup, label: str, nfe: int) -> Evaluation:
    """One row of the evidence; kept by weights, prompts and instruments, so that a teacher is measured once."""
    test = prompts.measuring_prompts()[2][: setup.num_prompts]
    varied = 8 if setup.num_prompts else setup.config.diversity_prompts
    painter, shape = setup.painter(label == "teacher", nfe), setup.opened.latents.shape
    console.print(f"evaluating the {label} at {nfe} steps on {len(test)} prompts")
    key = fingerprint(painter, test, f"{label}{varied}{setup.instruments.key()}")
    make = partial(setup.instruments.measure.evaluate, label, painter, test, varied, shape)
    return cached(CACHE, key, make)


def pictures(setup: Setup) -> dict[str, Tensor]:
    """The same eight prompts and seeds drawn by teacher (reference and few steps) and student, for the card."""
    test, shape = prompts.measuring_prompts()[2][:WATCHED_PICTURES], setup.opened.latents.shape
    return {
        f"{label}, {nfe} steps": setup.painter(label == "teacher", nfe).draw(test, list(range(len(test))), shape)
        for label, nfe in setup.wanted()
    }
