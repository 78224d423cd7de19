"""A RATS run of the starter world: puts teacher, scorers and judge together, and writes the bundle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from student.schedule import sigmas
from training.drawing import Painter
from training.evaluate import Evaluation, cached, fingerprint
from training.progress import console
from training.rats.preset import RatsConfig
from training.rats.trainer import Trainer, World
from training.rundir import FINISHED
from training.shapes import prompts
from training.shapes.instruments import CACHE, Instruments, Opened, instruments, open_model
from training.shapes.result import Calibration, Outcome, write

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it trains; ``opened.model`` becomes the student."""

    config: RatsConfig
    opened: Opened
    instruments: Instruments
    calibration: dict[str, Calibration]
    teacher: Painter

    @property
    def num_prompts(self) -> int | None:
        """How many validation and test prompts are used; None is all. A short run is not worth them all."""
        return SHORT_RUN_PROMPTS if self.config.steps < SHORT_RUN_STEPS else None

    def painter(self, teacher: bool, nfe: int) -> Painter:
        """The teacher (guided as configured) or the student at ``nfe`` steps."""
        if teacher:
            return Painter(self.teacher.model, self.opened.prompter, sigmas(nfe), self.config.guidance)
        return Painter(self.opened.model, self.opened.prompter, sigmas(nfe))


def run(config: RatsConfig, out: Path) -> None:
    """Train (or go on), evaluate, write the bundle, and mark the run as finished."""
    setup = prepare(config)
    trainer = Trainer(config, setup.opened.model, _world(setup), out / "run")
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
    teacher = Painter(copy.deepcopy(opened.model), opened.prompter, sigmas(config.reference_nfe), config.guidance)
    texts = prompts.measuring_prompts()[0]
    key = fingerprint(teacher, texts, "calibration" + tools.key())
    shape = opened.latents.shape
    base = cached(CACHE, key, lambda: tools.measure.evaluate("calibration", teacher, texts, 2, shape))
    calibration = {name: Calibration.of(base.scores[name], sha256) for name, sha256 in tools.sources.items()}
    return Setup(config, opened, tools, calibration, teacher)


def _world(setup: Setup) -> World:
    chosen_on = prompts.measuring_prompts()[1][: setup.num_prompts]
    config, trained, shape = setup.config, setup.calibration["trained"], setup.opened.latents.shape
    scorers = setup.instruments.measure.scorers

    def reward(images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        return (scorers["trained"](images_BCHW, texts).float() - trained.mean) / trained.std

    @torch.no_grad()
    def choose(painter: Painter) -> float:
        images = painter.draw(chosen_on, [1_000_000 + i for i in range(len(chosen_on))], shape)
        return setup.calibration["heldout"].standardise([float(scorers["heldout"](images, chosen_on).mean())])[0]

    def train_prompts(step: int) -> list[str]:
        return prompts.training_prompts(config.batch, config.seed, step)

    return World(setup.opened.prompter, train_prompts, reward, choose, shape)


def evaluate(setup: Setup) -> list[Evaluation]:
    """The evidence: teacher at its reference and at the student's step count, and the student, on test prompts."""
    config = setup.config
    wanted = (("teacher", config.reference_nfe), ("teacher", config.nfe), ("student", config.nfe))
    return [evaluate_one(setup, label, nfe) for label, nfe in wanted]


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
    test, shape = prompts.measuring_prompts()[2][:8], setup.opened.latents.shape
    wanted = (("teacher", setup.config.reference_nfe), ("teacher", setup.config.nfe), ("student", setup.config.nfe))
    return {
        f"{label}, {nfe} steps": setup.painter(label == "teacher", nfe).draw(test, list(range(8)), shape)
        for label, nfe in wanted
    }
