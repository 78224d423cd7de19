"""RATS runs as rows: a preset is a function that returns a complete configuration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from training.config import ConfigError
from training.rats import limits


@dataclass(frozen=True)
class RatsConfig:
    """One RATS run. What the paper (arXiv 2604.14910) does not publish is our own choice: alpha, tau, l2_weight,
    cosine_weight, ema, lr, and the horizons (the student's own sigmas).

    ``steps`` are optimizer steps, each of ``batch`` x ``accumulate`` samples a process. While ``step < guided_steps``
    the teacher is the frozen start, guided with ``guidance``; afterwards it is the EMA of the student, unguided.
    """

    # What is trained, and on what.
    model: str = "models/shapes-teacher"  # a folder or a hub id of a diffusers pipeline
    reward: str = "models/shapes-scorers/trained"  # NAME, or NAME:WEIGHT,NAME:WEIGHT (rewards/registry.py)
    heldout: str = "models/shapes-scorers/heldout"  # never trained on: chooses the checkpoint
    prompts: str = "shapes"  # or a file: text with one a line, or .jsonl with a "prompt" key
    measuring_prompts: str = ""  # a second file; without it some of ``prompts`` are held out
    height_px: int = 64
    width_px: int = 64
    frames: int = 1
    max_tokens: int = 12  # of the T5 encoder; 0 takes the pipeline's own
    weights: str = "fp32"
    student_id: str = "shapes"
    version: str = "1"
    # Student and teacher.
    nfe: tuple[int, ...] = (4,)  # one of them is drawn at each step
    teacher_nfe: int = 16
    reference_nfe: int = 50
    guidance: float = 1.0
    negative_prompt: str = ""  # what the guidance leads away from
    guided_steps: int = 0
    ema: float = 0.999  # 1 keeps the teacher as it was at the start
    # The objective.
    method: str = "rats"  # or a peer that uses no reward: "consistency", "matching"
    reward_weight: float = 1.0
    reward_hinge: float = math.inf  # rewards above it count no more
    reward_frames: int = 0  # of a video, latent frames decoded for the reward at each step; 0 takes all
    alpha: float = 1.0
    steer: float = 0.0  # the share of the teacher's diversity that alpha is led to at each validation; 0 leaves alpha
    gate: str = "reward"  # "confidence": by the teacher's own reward; "constant": 0.5 everywhere; "one": 1 everywhere
    tau: float = 1.0
    tau_in_spreads: bool = False  # tau times the running deviation of the gap
    horizons: str = "student"  # "end": the last state alone; or sigmas, such as "0.8,0.4,0"
    l2_weight: float = 1.0
    cosine_weight: float = 0.5
    velocity_hinge: float = math.inf  # allowed ratio of the student's velocity norm to the teacher's
    gradient: str = "full"
    last_k: int = 1
    # The optimizer.
    steps: int = 300
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 10
    lr_decay: float = 0.0  # the share of the run over which the rate falls to 0
    clip_norm: float = 1.0
    lora_rank: int = 0  # 0 trains all weights
    lora_alpha: float = 64.0
    precision: str = "bf16"
    device: str = "auto"  # the GPU where there is one
    checkpointing: bool = False
    shard: bool = False  # spread the transformers over the processes (FSDP2)
    # Looking at it.
    validate_every: int = 25
    patience: int = 0  # stop after so many validations without a better held-out score; 0 never
    min_diversity: float = 0.9  # no checkpoint is chosen with less of the teacher's diversity than this; 0 for any
    calibration_prompts: int = 128  # at most, as all of these: a file may hold fewer
    validation_prompts: int = 256
    watched_prompts: int = 32  # of the validation prompts, whose diversity is watched while a run trains
    test_prompts: int = 512
    diversity_prompts: int = 64  # of the test prompts
    draw_batch: int = 64
    seed: int = 401

    def check(self) -> None:
        """Raise ConfigError for a value that no run can use, before anything is loaded."""
        limits.check(self)


def shapes() -> RatsConfig:
    """The starter world: 2 to 3 s a step on one core. The teacher's guidance is baked into the student."""
    return RatsConfig(
        teacher_nfe=8,
        guidance=2.5,
        guided_steps=400,
        steps=460,
        lr=1.5e-4,
        lr_decay=0.4,
        # Chosen on validation prompts: 20 gained a fifth of the held-out score; with 4 the diversity of 8 seeds fell by
        # a fifth within 100 steps.
        alpha=8.0,
        tau=0.5,
        validate_every=40,
    )


def distillation() -> RatsConfig:
    """The teacher's trajectory alone: no reward, and a gate that is always open."""
    return replace(shapes(), reward_weight=0.0, gate="one")


def reward_only() -> RatsConfig:
    """The reward alone, through all steps (ReFL and DRaFT's form for a few-step student)."""
    return replace(shapes(), alpha=0.0)


def draft_1() -> RatsConfig:
    """DRaFT-1 (arXiv 2309.17400): the reward alone, through the last step alone."""
    return replace(reward_only(), gradient="last_k", last_k=1)


def draft_lv() -> RatsConfig:
    """DRaFT-LV: DRaFT-1 whose last step is repeated from another noise, for a gradient of lower variance."""
    return replace(reward_only(), gradient="low_variance")


def constant_gate() -> RatsConfig:
    """RATS without the gate: shaping counts the same whoever is ahead."""
    return replace(shapes(), gate="constant")


def no_horizon() -> RatsConfig:
    """RATS that compares the last state alone."""
    return replace(shapes(), horizons="end")


def frozen_teacher() -> RatsConfig:
    """RATS whose teacher never follows the student."""
    return replace(shapes(), guided_steps=shapes().steps)


def steered() -> RatsConfig:
    """RATS whose alpha is found while it trains: as much reward as leaves 85 % of the teacher's diversity."""
    return replace(shapes(), steer=0.85, min_diversity=0.82, validate_every=20)


def _paper(model: str, student_id: str, nfe: int, side_px: int) -> RatsConfig:
    """What the paper says of its runs: NFE against 50, bf16, 400 steps; the rest is our choice.

    PickScore and HPS v2.1 are tuned from one CLIP, so neither judges the other: ImageReward is held out.
    """
    return RatsConfig(
        model=model,
        student_id=student_id,
        reward="hpsv2.1",
        heldout="imagereward",
        prompts="prompts.txt",
        height_px=side_px,
        width_px=side_px,
        max_tokens=0,
        weights="bf16",
        nfe=(nfe,),
        teacher_nfe=50,
        steps=400,
        batch=1,
        accumulate=8,
        lr=1e-5,
        lora_rank=32,
        gradient="detached",
        checkpointing=True,
        tau=1.0,
        tau_in_spreads=True,
        draw_batch=4,
        validate_every=50,
        # Evaluation then adds 15 to 26 % to the training's calls (docs/cost.md).
        calibration_prompts=64,
        validation_prompts=64,
        watched_prompts=8,
        test_prompts=256,
        diversity_prompts=16,
    )


def flux_dev() -> RatsConfig:
    """FLUX.1-dev, 3 NFE at 512 px. The paper's step takes 7.57 s and 68 GB on one GPU; ours has 8 samples, so about
    8 times that (estimated: 7 h for 400 steps on an 80 GB GPU).
    """
    return replace(_paper("black-forest-labs/FLUX.1-dev", "flux-dev", 3, 512), max_tokens=512)


def sd35_medium() -> RatsConfig:
    """SD 3.5 medium, 5 NFE at 512 px: a fifth of FLUX's size, guided; estimated: 3 h on an 80 GB GPU.

    Its teacher needs guidance: guided and frozen for the first half, then the EMA of the student.
    """
    base = _paper("stabilityai/stable-diffusion-3.5-medium", "sd35-medium", 5, 512)
    return replace(base, guidance=4.5, guided_steps=200, max_tokens=256)


# As WanPipeline's own example says it.
WAN_NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)


def wan_1_3b() -> RatsConfig:
    """Wan 2.1 1.3B, text to video, 8 NFE at 480p, 33 frames: about 12 h on an 80 GB GPU (estimated).

    The reward sees one latent frame a step, another each time: the decoder keeps 10 GB for its gradient then, and 219
    GB for all nine (both counted).
    """
    base = _paper("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-1.3b", 8, 480)
    return replace(
        base,
        width_px=832,
        frames=33,
        reward_frames=1,
        guidance=5.0,
        negative_prompt=WAN_NEGATIVE,
        guided_steps=200,
        accumulate=4,
        draw_batch=1,
        test_prompts=128,
        diversity_prompts=8,
    )


def consistency() -> RatsConfig:
    """Phased consistency distillation of the guided teacher (training/rats/consistency.py)."""
    return replace(shapes(), method="consistency", guided_steps=shapes().steps, ema=0.95, reward_weight=0.0)


def matching() -> RatsConfig:
    """DMD2-style distribution matching to the guided teacher (training/rats/matching.py)."""
    return replace(shapes(), method="matching", lr=5e-5, reward_weight=0.0)


PRESETS: dict[str, Callable[[], RatsConfig]] = {
    "shapes": shapes,
    "shapes-distillation": distillation,
    "shapes-reward-only": reward_only,
    "shapes-draft-1": draft_1,
    "shapes-draft-lv": draft_lv,
    "shapes-constant-gate": constant_gate,
    "shapes-no-horizon": no_horizon,
    "shapes-frozen-teacher": frozen_teacher,
    "shapes-steered": steered,
    "shapes-consistency": consistency,
    "shapes-matching": matching,
    "flux-dev": flux_dev,
    "sd35-medium": sd35_medium,
    "wan-1.3b": wan_1_3b,
}


def preset(name: str) -> RatsConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}: {hint}")
    return PRESETS[name]()
