"""What a RATS run is made of: the teacher and the rewards opened and tried, the rewards calibrated on the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from rewards.interface import said
from student.bundle import ImageSize, Latents
from student.families.family import Family
from student.families.find import open_family
from training import instruments
from training.config import ConfigError
from training.drawing import Painter
from training.evaluate import Measure, Plan, cached, fingerprint, hash_model
from training.instruments import TRAINED, Scale, calibration, measure_with, open_instruments, try_out
from training.probe import pictures
from training.processes import Processes, state
from training.progress import console
from training.prompts import Prompts, cut_lines, from_files
from training.rats.networks import Networks
from training.rats.preset import RatsConfig
from training.rats.trainer import networks_of

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64
TRIED_PICTURES = 2
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
    options: dict[str, Any] = {"max_tokens": config.max_tokens} if config.max_tokens else {}
    model = open_family(config.model, DTYPES[config.weights], **options)
    latents = model.geometry(config.height_px, config.width_px, config.frames)
    place(config, model)
    _warn_of_cut(config, model)
    learns = config.reward_weight > 0
    rewards = open_instruments(config.reward, config.heldout, model, learns, device)
    tried, _ = pictures(TRIED_PICTURES, config.height_px, config.width_px)
    try_out(rewards, tried, prompts.calibration[:1] * TRIED_PICTURES, learns)
    measure = measure_with(rewards, model, prompts.judge)
    weights = hash_model(model)  # now, with the text encoders, and without adapters
    if prompts.of_file:
        model.remember(asked_of(config, prompts))
    networks = networks_of(config, model)
    sigmas = model.sigmas(config.reference_nfe, latents.shape)
    teacher = Painter(model, sigmas, config.guidance, config.negative_prompt)
    texts = prompts.calibration
    plan = Plan(texts, [], latents.shape, config.draw_batch)
    key = fingerprint(weights, teacher, plan, "calibration" + "".join(one.source for one in rewards))
    with networks.role("start"):
        base = cached(instruments.CACHE, key, lambda: measure.evaluate("calibration", teacher, plan))
    scale = Scale(rewards, {one.name: calibration(one.asked, base.scores[one.name]) for one in rewards})
    highest = float(np.percentile(scale.standardised(base, TRAINED), 99.9))
    return Setup(config, networks, latents, prompts, measure, scale, highest, weights)


def place(config: RatsConfig, model: Family) -> None:
    """Put a model on this process's device; a transformer that is to be spread goes there later, slice by slice."""
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
    if config.prompts == "shapes":
        from training.shapes.prompts import source

        prompts = source(config.seed)
    else:
        measuring = Path(config.measuring_prompts) if config.measuring_prompts else None
        prompts = from_files(Path(config.prompts), measuring, config.seed)
    validation, test = config.validation_prompts, config.test_prompts
    if config.steps < SHORT_RUN_STEPS:
        validation, test = min(validation, SHORT_RUN_PROMPTS), min(test, SHORT_RUN_PROMPTS)
    return prompts.first(config.calibration_prompts, validation, test)


def asked_of(config: RatsConfig, prompts: Prompts) -> list[str]:
    """Every prompt that this process will draw: of a long file only those of its own steps (FLUX: 4 MB each)."""
    processes = Processes()
    total = config.batch * config.accumulate * processes.size
    mine = [at + i for at in processes.share(range(0, total, config.batch)) for i in range(config.batch)]
    texts = (prompts.train(step, total) for step in range(config.steps))
    trained = (drawn[i] for drawn in texts for i in mine)
    return list(
        dict.fromkeys((config.negative_prompt, *prompts.calibration, *prompts.validation, *prompts.test, *trained))
    )


def _warn_of_cut(config: RatsConfig, model: Family) -> None:
    """Say which prompts of the run's files the model does not read to their end."""
    for name in {config.prompts, config.measuring_prompts} - {"", "shapes"} if state().is_main_process else ():
        if lines := cut_lines(model, Path(name)):
            sentence = f"{name}: {lines} have more than the {model.max_tokens} tokens that the model reads, and are cut"
            console.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False)
