"""Sets up a RATS run: opens the teacher and the rewards, tries them out, and calibrates the rewards on the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import nn

from rewards.interface import said
from rewards.twostage import PromptTokenizer
from rewards.weighted import Weighted
from student.bundle import ImageSize, Latents
from student.families.family import Family
from student.families.find import open_family
from student.families.flux import Flux
from student.families.two_experts import TwoExperts, called_at, joined
from training import evaluate, tracker
from training.beginning import beginning
from training.conditions import Conditions
from training.config import ConfigError
from training.evaluate import Measure, Plan, cached, fingerprint, fingerprint_of, hash_model
from training.probe import pictures
from training.processes import Processes, kind_of, state
from training.progress import console
from training.prompts import Prompts, cut_lines, from_files
from training.quantise import quantise, require
from training.rats.config import SHAPES, RatsConfig
from training.rats.roles import Roles
from training.sampler import Sampler, precision
from training.scorers import (
    TRAINED,
    Rewards,
    all_terms,
    calibrated,
    calibrated_on_windows,
    frame_windows,
    measure_with,
    move,
    open_rewards,
    sources,
    try_out,
    with_windows,
)

SHORT_RUN_STEPS, SHORT_RUN_PROMPTS = 50, 64
TRIED_PICTURES = 2
PROBE = "A red heart, above 1 blue star."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """All of a run that stays fixed while it trains, and the roles' networks, which do not.

    ``rewards`` are calibrated, by role; ``reward`` is the trained one on the scale of what a step shows it (some frames
    of a video). ``teacher`` is the hash of the teacher's weights, its text encoders among them, and their form.
    """

    config: RatsConfig
    roles: Roles
    latents: Latents
    prompts: Prompts
    measure: Measure
    rewards: dict[str, Weighted]
    reward: Weighted
    reward_p999: float
    teacher: str

    @property
    def model(self) -> Family:
        """The family whose transformer becomes the student."""
        model: Family = self.roles.model
        return model

    @property
    def image(self) -> ImageSize:
        """The size of the images or videos."""
        image = self.config.image
        frames, fps = (image.frames, self.model.fps) if self.latents.frames else (None, None)
        return ImageSize(image.height_px, image.width_px, frames, fps)

    def sampler(self, model: Family, label: str, nfe: int) -> Sampler:
        """The teacher (guided as configured) or the student at ``nfe`` steps."""
        teacher = self.config.teacher
        guidance = teacher.guidance if label == "teacher" else 1.0
        # The teacher's own schedule: a bundle's scheduler shifts no more.
        sigmas = self.model.sigmas(nfe, self.latents.shape)
        return Sampler(model, sigmas, guidance, teacher.negative_prompt, self.config.compute.precision)

    def plan(self, prompts: Sequence[str], varied: Sequence[str]) -> Plan:
        """What an evaluation generates: each of ``prompts`` once, each of ``varied`` several times."""
        return Plan(prompts, varied, self.latents.shape, self.config.validation.batch)


def prepare(config: RatsConfig) -> Setup:
    """Open the teacher and the rewards, and calibrate the rewards on the teacher.

    Raises:
        BundleError: the model is not a diffusers pipeline of a supported class.
        RewardError: a reward that does not exist or cannot be used in its role.
        ConfigError: prompts that cannot be used.
        SizeError: an image size that the model cannot generate.
    """
    image, teacher, optim = config.image, config.teacher, config.optim
    require("compute.quantise", config.compute.quantise)
    require("optim.state", optim.state)
    require("tracker", config.tracker, tracker.PACKAGES)
    if config.gate.tau_in_std and optim.batch * optim.accumulate * state().num_processes < 2:
        raise ConfigError("gate.tau_in_std is true: it needs 2 or more samples per step, and this run has 1")
    prompts = _prompts(config)
    device = _device(config)
    # Where a run computes in bf16, what autocast leaves in fp32 may use the tensor cores too.
    torch.backends.cuda.matmul.allow_tf32 = config.compute.precision == "bf16"
    options: dict[str, Any] = {"max_tokens": config.data.max_tokens} if config.data.max_tokens else {}
    model = joined(open_family(config.model, DTYPES[config.compute.weights], **options))
    _set_guidance(config, model)
    _check_experts(config, model)
    if model.is_distilled and teacher.guidance != 1.0:
        raise ConfigError(f"teacher.guidance is {teacher.guidance}: {config.model} is distilled, so accepted is 1")
    latents = model.geometry(image.height_px, image.width_px, image.frames)
    learns, named = config.needs_gradient, config.reward
    rewards = open_rewards(named.trained, named.heldout, model, learns, device, DTYPES[named.weights], named.reported)
    _warn_of_cut(config, model, rewards)
    tried, _ = pictures(TRIED_PICTURES, image.height_px, image.width_px)
    try_out(rewards, tried, prompts.calibration[:1] * TRIED_PICTURES, learns)
    measure = measure_with(rewards, model, prompts.judge, config.validation.dinov2)
    windows = frame_windows(config.reward.frames, latents.frames, image.frames)
    calibration = with_windows(measure, rewards[TRAINED], windows)
    weights = hash_model(model) + config.compute.quantise  # now, with the text encoders, and without adapters
    weights += f"tiles of {config.compute.tile_px}" if config.compute.tile_px else ""
    weights += "teacher in bf16" if config.teacher.weights == "bf16" else ""
    if prompts.of_file:
        remember(config, model, rewards, prompts_of_run(config, prompts))
    begin = student_start(config, model.transformer)
    for network in (model.transformer, begin):
        quantise(network, config.compute.quantise)
    place(config, model)
    if begin is not None and not config.compute.shard:
        begin.to(_device(config))
    roles = Roles.of(config, model, begin, learning(config, model, latents.shape))
    sigmas = model.sigmas(teacher.reference_nfe, latents.shape)
    sampler = Sampler(model, sigmas, teacher.guidance, teacher.negative_prompt, config.compute.precision)
    plan = Plan(prompts.calibration, [], latents.shape, config.validation.batch)
    key = fingerprint(weights, sampler, plan, f"calibration{windows}{config.reward.weights}{sources(rewards)}")
    with roles.role("start"):
        base = cached(evaluate.CACHE, key, lambda: calibration.evaluate("calibration", sampler, plan))
    reward = calibrated_on_windows(rewards[TRAINED], base.scores, windows)
    rewards = calibrated(rewards, base.scores)
    highest = float(np.percentile(rewards[TRAINED].of_raw(base.scores), 99.9))
    return Setup(config, roles, latents, prompts, measure, rewards, reward, highest, weights)


def _set_guidance(config: RatsConfig, model: Family) -> None:
    """The input of a guidance-distilled FLUX; a model that is tuned (guidance 1 by default) keeps its own."""
    if isinstance(model, Flux) and model.guidance is not None:
        if config.method != "tune" or config.teacher.guidance != 1.0:
            model.guidance = config.teacher.guidance


def _check_experts(config: RatsConfig, model: Any) -> None:
    """Raises ConfigError for what only one transformer, or only two experts, can do; sets the second's guidance."""
    has_two, second = isinstance(model.transformer, TwoExperts), config.teacher.guidance_2
    if has_two and config.compute.shard and config.method != "rats":
        raise ConfigError(f"compute.shard is true: {config.model} has two experts, so accepted is only method=rats")
    if second and not has_two:
        raise ConfigError(f"teacher.guidance_2 is {second}: {config.model} has one transformer, so accepted is 0")
    if second:
        model.guidance_2 = second


def learning(config: RatsConfig, model: Family, shape: Sequence[int]) -> tuple[str, ...]:
    """The transformers that a run trains: of two experts those that the student's steps call."""
    counts = (config.teacher.nfe,) if config.method == "consistency" else config.student.nfe  # it learns at every point
    sigmas = [sigma for nfe in counts for sigma in model.sigmas(nfe, shape)]
    return called_at(sigmas, getattr(model.transformer, "boundary", None))


def student_start(config: RatsConfig, teacher: Any) -> Any:
    """The transformer that the student begins as, not quantised; None where it is the teacher's."""
    if not config.student.init:
        return None
    return beginning(config.student.init, config.model, teacher, DTYPES[config.compute.weights])


def remember(config: RatsConfig, model: Family, rewards: Rewards, prompts: list[str]) -> None:
    """Encode what nobody has encoded yet, each process its share, and let go of the encoders.

    The rewards make room for them on the device meanwhile.
    """
    encoders = nn.ModuleList([part for name in model.encoders if (part := getattr(model, name)) is not None])
    read = [ids_BL.tolist() for ids_BL in model.tokenise([PROBE])]  # by this tokenizer, to this length
    key = [hash_model(encoders), type(model).__name__, read, config.compute.precision, kind_of(_device(config))]
    conditions = Conditions(evaluate.CACHE.with_name("conditions") / fingerprint_of(key), prompts)
    processes = Processes()
    for share in ((processes.index, processes.size), (0, 1)):  # what is missing then lies on another machine's disk
        if missing := conditions.missing(*share):
            move(rewards, "cpu")
            place(config, model, model.encoders)
            with precision(config.compute.precision, torch.device(_device(config))):  # as everything else is computed
                conditions.encode(model, missing)
            move(rewards, _device(config))
        processes.wait()
    model.remember(conditions)


def place(config: RatsConfig, model: Family, names: Sequence[str] = ()) -> None:
    """Move a model, or some of its parts, to this process's device.

    A transformer that will be sharded is moved later, slice by slice.
    """
    in_slices = {"transformer"} if config.compute.shard and state().num_processes > 1 else set()
    for name, part in model.named_children():
        if (not names or name in names) and name not in in_slices:
            part.to(_device(config))


def _device(config: RatsConfig) -> str:
    """This process's GPU where there is one; a device that the configuration names is used as it is.

    Raises:
        ConfigError: there is no such device here.
    """
    device = config.compute.device
    if device == "auto":
        return str(state().device) if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ConfigError(f"compute.device is {device!r}, which cannot be used here: {said(error)}") from error
    return device


def _prompts(config: RatsConfig) -> Prompts:
    """The starter world's, or those of a file; a run shorter than SHORT_RUN_STEPS is evaluated on fewer."""
    data = config.data
    if data.prompts == SHAPES:
        from training.shapes.prompts import source

        prompts = source(config.seed)
    else:
        measuring = Path(data.measuring) if data.measuring else None
        prompts = from_files(Path(data.prompts), measuring, config.seed, data.copies)
    validation, test = data.validation, data.test
    if config.steps < SHORT_RUN_STEPS:
        validation, test = min(validation, SHORT_RUN_PROMPTS), min(test, SHORT_RUN_PROMPTS)
    return prompts.first(data.calibration, validation, test)


def prompts_of_run(config: RatsConfig, prompts: Prompts) -> list[str]:
    """Every prompt that the run's processes will draw."""
    total = config.optim.batch * config.optim.accumulate * Processes().size
    trained = (prompt for step in range(config.steps) for prompt in prompts.train(step, total))
    measured = (*prompts.calibration, *prompts.validation, *prompts.test)
    return list(dict.fromkeys((config.teacher.negative_prompt, *measured, *trained)))


def _warn_of_cut(config: RatsConfig, model: Family, rewards: Rewards) -> None:
    """Warn about the prompts of the run's files that are longer than what the model, or one of its rewards, reads."""
    readers = [(f"the {model.most_tokens} tokens that the model reads", model.cuts)]
    for term in all_terms(rewards):
        words = getattr(term.reward, "words", None)
        if isinstance(words, PromptTokenizer):
            readers.append((f"the {words.length} tokens that the reward {term.asked!r} reads", words.cuts))
    for name in {config.data.prompts, config.data.measuring} - {"", SHAPES} if state().is_main_process else ():
        for reads, cuts in readers:
            if lines := cut_lines(cuts, Path(name)):
                sentence = f"{name}: {lines} cut, longer than {reads}"
                console.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False)
