"""A RATS run from its teacher to its bundle: opens everything, trains, measures, and writes what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from training.evaluate import Evaluation, Measure, Plan, cached, fingerprint, hash_model, in_turns, looked_at
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
from training.rats.networks import Networks
from training.rats.preset import RatsConfig
from training.rats.trainer import Trainer, World, networks_of
from training.result import Outcome, save, write
from training.rundir import FINISHED
from training.sharding import spread

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64
TRIED_PICTURES = 2
VALIDATION_SEED, WATCHED_PROMPTS, WATCHED_PICTURES = 1_000_000, 32, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it trains, and the networks that do.

    ``teacher`` is the hash of the teacher's weights, its text encoders among them.
    """

    config: RatsConfig
    networks: Networks
    latents: Latents
    prompts: Prompts
    measure: Measure
    scale: Scale
    reward_p999: float
    teacher: str

    @property
    def model(self) -> Family:
        """The family whose transformer becomes the student."""
        model: Family = self.networks.model
        return model

    @property
    def image(self) -> ImageSize:
        """The size of what is drawn."""
        config = self.config
        return ImageSize(config.height_px, config.width_px, config.frames if self.latents.frames else None)

    def painter(self, model: Family, label: str, nfe: int) -> Painter:
        """The teacher (guided as configured) or the student at ``nfe`` steps."""
        guidance = self.config.guidance if label == "teacher" else 1.0
        # The teacher's own schedule: a bundle's scheduler shifts no more.
        return Painter(model, self.model.sigmas(nfe, self.latents.shape), guidance, self.config.negative_prompt)

    def plan(self, prompts: Sequence[str], varied: Sequence[str]) -> Plan:
        """What is drawn for figures: each of ``prompts`` once, each of ``varied`` several times."""
        return Plan(prompts, varied, self.latents.shape, self.config.draw_batch)


def run(setup: Setup, out: Path) -> None:
    """Train (or go on), write the bundle, measure what was written, and mark the run as finished."""
    config, here = setup.config, state()
    environment.write(out / "run" / "environment.json")
    teachers = _train(setup, out)
    model = reopened(setup, out)
    students = [evidence(setup, model, "student", nfe) for nfe in config.nfe]
    if here.is_main_process:
        table, shown = zip(*teachers, *students, strict=True)
        pictures = {f"{row.label}, {row.nfe} steps": drawn for row, drawn in zip(table, shown, strict=True)}
        write(out, Outcome(config, setup.model, setup.latents, setup.image, setup.scale, table, pictures))
        (out / "run" / FINISHED).write_text("")
        (out / "run" / "checkpoint.pt").unlink(missing_ok=True)
        console.print(f"the student is in {out}; its card is {out / 'README.md'}")


def _train(setup: Setup, out: Path) -> list[tuple[Evaluation, Tensor]]:
    """Train, and leave the student's pipeline in ``out``; the teacher's evidence."""
    trainer = Trainer(setup.config, setup.networks, world(setup, out / "run"), out / "run")
    trainer.run()
    steps = dict.fromkeys((setup.config.reference_nfe, *setup.config.nfe))
    with setup.networks.role("start") as model:
        found = [evidence(setup, model, "teacher", nfe) for nfe in steps]
    setup.networks.gather(keep=trainer.is_first)
    if trainer.is_first:
        setup.networks.merge(out / "adapter")
        save(out, setup.config.model, setup.model.transformer)
    state().wait_for_everyone()
    return found


def reopened(setup: Setup, out: Path) -> Family:
    """The student as its bundle holds it: merged, and rounded to the type that it is kept in.

    Its transformer takes the trained one's place in ``setup.model``, so that the memory of that is free.
    """
    model = open_family(out, DTYPES[setup.config.weights], local_files_only=True, max_tokens=setup.model.max_tokens)
    setup.model.transformer = model.transformer
    _place(setup.config, model)
    if setup.config.shard and state().num_processes > 1:
        spread(model.transformer, state().num_processes)
    if setup.prompts.known is not None:
        model.remember(setup.prompts.test)
    return model


def prepare(config: RatsConfig) -> Setup:
    """Open the teacher and the rewards, and calibrate the rewards on the teacher.

    Raises:
        BundleError: the model is no diffusers pipeline of a supported class.
        RewardError: a reward that does not exist or cannot be used so.
        ConfigError: prompts that cannot be used.
        SizeError: a picture size that the model cannot draw.
    """
    if config.tau_in_spreads and config.batch * config.accumulate * state().num_processes < 2:
        raise ConfigError("tau_in_spreads is true: it needs the spread of 2 or more samples a step, and there is one")
    prompts = _prompts(config)
    device = _device(config)
    options = {"max_tokens": config.max_tokens} if config.max_tokens else {}
    model = open_family(config.model, DTYPES[config.weights], **options)
    latents = model.geometry(config.height_px, config.width_px, config.frames)
    _place(config, model)
    _warn_of_cut(config, model)
    learns = config.reward_weight > 0
    rewards = open_instruments(config.reward, config.heldout, model, learns, device)
    tried, _ = pictures(TRIED_PICTURES, config.height_px, config.width_px)
    try_out(rewards, tried, prompts.calibration[:1] * TRIED_PICTURES, learns)
    measure = measure_with(rewards, model, prompts.judge)
    weights = hash_model(model)  # now, with the text encoders, and without adapters
    if prompts.known is not None:
        model.remember([config.negative_prompt, *prompts.known])
    networks = networks_of(config, model)
    sigmas = model.sigmas(config.reference_nfe, latents.shape)
    teacher = Painter(model, sigmas, config.guidance, config.negative_prompt)
    texts = prompts.calibration
    plan = Plan(texts, [], latents.shape, config.draw_batch)
    key = fingerprint(weights, teacher, plan, "calibration" + "".join(one.source for one in rewards))
    with networks.role("start"):
        base = cached(CACHE, key, lambda: measure.evaluate("calibration", teacher, plan))
    scale = Scale(rewards, {one.name: calibration(one.asked, base.scores[one.name]) for one in rewards})
    highest = float(np.percentile(scale.standardised(base, TRAINED), 99.9))
    return Setup(config, networks, latents, prompts, measure, scale, highest, weights)


def _place(config: RatsConfig, model: Family) -> None:
    """On this process's device; a transformer that is to be spread goes there later, slice by slice."""
    whole = not (config.shard and state().num_processes > 1)
    for name, part in model.named_children():
        if whole or name != "transformer":
            part.to(_device(config))


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
        return float(np.mean(cached(CACHE, key, measure).diversity))


def _validation(setup: Setup) -> Plan:
    """What is drawn at each look of a run."""
    texts = setup.prompts.validation
    plan = setup.plan(texts, texts[:WATCHED_PROMPTS])
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
    return cached(CACHE, key, lambda: setup.measure.evaluate(label, painter, plan))
