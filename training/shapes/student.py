"""A RATS run of the starter world: puts teacher, scorers and judge together, and writes the bundle.

Legend: B images, C channels, H/W latent cells or pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewards import shapes as rewards
from student.bundle import BundleError, ImageSize, Latents, hash_weights
from student.families.flux import Flux
from student.pipeline import open_pipeline
from student.schedule import sigmas
from training.drawing import Painter, Prompter
from training.evaluate import Evaluation, Measure, ScoreFn, cached, fingerprint
from training.progress import console
from training.rats.preset import RatsConfig
from training.rats.trainer import Trainer, World
from training.rundir import FINISHED
from training.shapes import prompts, vocabulary
from training.shapes.judging import judge_prompts
from training.shapes.result import Calibration, Outcome, write

CACHE = Path.home() / ".cache" / "fewstep" / "evaluation"
SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it trains."""

    config: RatsConfig
    pipe: object
    model: Flux
    prompter: Prompter
    latents: Latents
    image: ImageSize
    scorers: dict[str, rewards.Scorer]
    calibration: dict[str, Calibration]
    measure: Measure
    teacher: Painter

    @property
    def is_short(self) -> bool:
        """A run too short to be evaluated in full."""
        return self.config.steps < SHORT_RUN_STEPS


def run(config: RatsConfig, out: Path) -> None:
    """Train (or go on), evaluate, write the bundle, and mark the run as finished."""
    setup = prepare(config)
    trainer = Trainer(config, setup.model, _world(setup), out / "run")
    trainer.run()
    table = evaluate(setup, trainer.painter())
    write(out, Outcome(config, setup.pipe, setup.latents, setup.image, setup.calibration, table, pictures(setup)))
    (out / "run" / FINISHED).write_text("")
    (out / "run" / "checkpoint.pt").unlink(missing_ok=True)
    console.print(f"the student is in {out}; its card is {out / 'README.md'}")


def prepare(config: RatsConfig) -> Setup:
    """Open the teacher and the scorers, and calibrate the scorers on the teacher.

    Raises:
        BundleError: the model's folder holds no diffusers pipeline.
    """
    if not (Path(config.model) / "model_index.json").is_file():
        raise BundleError(f"{config.model} is not a diffusers pipeline: it has no model_index.json")
    pipe = open_pipeline(Path(config.model))
    model = Flux(pipe)
    prompter = Prompter(pipe.tokenizer, pipe.tokenizer_2, vocabulary.MAX_TOKENS)
    latents, image = geometry(pipe)
    scorers = {"trained": rewards.load(Path(config.scorer)), "heldout": rewards.load(Path(config.heldout))}
    sources = {"trained": hash_weights(Path(config.scorer)), "heldout": hash_weights(Path(config.heldout))}
    for scorer in scorers.values():
        scorer.requires_grad_(False)
    functions = {name: _score_fn(scorer, prompter) for name, scorer in scorers.items()}
    measure = Measure(functions, judge_prompts, _latent_features(model))
    teacher = Painter(copy.deepcopy(model), prompter, sigmas(config.reference_nfe), config.guidance)
    calibration_prompts = prompts.measuring_prompts()[0]
    key = fingerprint(teacher, calibration_prompts, "calibration" + "".join(sources.values()))
    base = cached(CACHE, key, lambda: measure.evaluate("calibration", teacher, calibration_prompts, 2, latents.shape))
    calibration = {name: Calibration.of(base.scores[name], sources[name]) for name in functions}
    return Setup(config, pipe, model, prompter, latents, image, scorers, calibration, measure, teacher)


def geometry(pipe: object) -> tuple[Latents, ImageSize]:
    """Latent and image geometry of a 64x64 pipeline."""
    vae, channels = pipe.vae.config, pipe.transformer.config.in_channels // 4  # type: ignore[attr-defined]
    side = 64 // pipe.vae_scale_factor  # type: ignore[attr-defined]
    return Latents(side, side, channels, 2, vae.scaling_factor, vae.shift_factor), ImageSize(64, 64)


def _score_fn(scorer: rewards.Scorer, prompter: Prompter) -> ScoreFn:
    def score(images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        ids_BL, _ = prompter.ids(texts)
        result: Tensor = scorer(images_BCHW, ids_BL)
        return result

    return score


def _latent_features(model: Flux) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def features(images_BCHW: Tensor) -> Tensor:
        parts = [model.vae.encoder(part * 2 - 1) for part in images_BCHW.split(64)]
        return torch.cat(parts)

    return features


def _world(setup: Setup) -> World:
    _, validation, _ = prompts.measuring_prompts()
    config, trained = setup.config, setup.calibration["trained"]
    score, heldout = setup.measure.scorers["trained"], setup.measure.scorers["heldout"]
    chosen_on = validation[: SHORT_RUN_PROMPTS if setup.is_short else None]

    def reward(images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        return (score(images_BCHW, texts).float() - trained.mean) / trained.std

    @torch.no_grad()
    def choose(painter: Painter) -> float:
        seeds = [1_000_000 + i for i in range(len(chosen_on))]
        images = painter.draw(chosen_on, seeds, setup.latents.shape)
        return float(heldout(images, chosen_on).mean())

    def train_prompts(step: int) -> list[str]:
        return prompts.training_prompts(config.batch, config.seed, step)

    return World(setup.prompter, train_prompts, reward, choose, setup.latents.shape)


def evaluate(setup: Setup, student: Painter) -> list[Evaluation]:
    """The evidence: teacher at its reference and at the student's step count, and the student, on test prompts."""
    config = setup.config
    test = prompts.measuring_prompts()[2][: SHORT_RUN_PROMPTS if setup.is_short else None]
    varied = 8 if setup.is_short else config.diversity_prompts
    few = Painter(setup.teacher.model, setup.prompter, sigmas(config.nfe), config.guidance)
    instruments = "".join(part.source_sha256 for part in setup.calibration.values()) + str(varied)
    table = []
    for label, painter in (("teacher", setup.teacher), ("teacher", few), ("student", student)):
        console.print(f"evaluating the {label} at {len(painter.sigmas)} steps on {len(test)} prompts")
        key = fingerprint(painter, test, label + instruments)
        table.append(_measured(setup, label, painter, test, varied, key))
    return table


def _measured(setup: Setup, label: str, painter: Painter, test: list[str], varied: int, key: str) -> Evaluation:
    shape = setup.latents.shape
    return cached(CACHE, key, lambda: setup.measure.evaluate(label, painter, test, varied, shape))


def pictures(setup: Setup) -> dict[str, Tensor]:
    """The same eight prompts and seeds drawn by teacher (reference and few steps) and student, for the card."""
    test = prompts.measuring_prompts()[2][:8]
    few = sigmas(setup.config.nfe)
    painters = {
        f"teacher, {setup.config.reference_nfe} steps": setup.teacher,
        f"teacher, {setup.config.nfe} steps": Painter(setup.teacher.model, setup.prompter, few, setup.config.guidance),
        f"student, {setup.config.nfe} steps": Painter(setup.model, setup.prompter, few),
    }
    return {label: painter.draw(test, list(range(8)), setup.latents.shape) for label, painter in painters.items()}
