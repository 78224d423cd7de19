"""RATS runs as rows: a preset is a function that returns a complete configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from training.config import ConfigError, changed
from training.rats.config import RatsConfig


def shapes() -> RatsConfig:
    """The starter world: 2 to 3 s a step on one core. The teacher's guidance is baked into the student."""
    return changed(
        RatsConfig(),
        {
            "teacher.nfe": 8,
            "teacher.guidance": 2.5,
            "teacher.guided_steps": 400,
            "steps": 460,
            "optim.lr": 1.5e-4,
            "optim.decay": 0.4,
            "shaping.alpha": 8.0,
            "gate.tau": 0.5,
            "validation.every": 40,
            "validation.batch": 16,  # a guided teacher of 50 steps shows on a busy core every few seconds how far it is
        },
    )


def distillation() -> RatsConfig:
    """The teacher's trajectory alone: no reward, and a gate that is always 1."""
    return changed(shapes(), {"reward.weight": 0.0, "gate.kind": "one"})


def reward_only() -> RatsConfig:
    """The reward alone, through all steps (ReFL and DRaFT's form for a few-step student)."""
    return changed(shapes(), {"shaping.alpha": 0.0})


def draft_1() -> RatsConfig:
    """DRaFT-1 (arXiv 2309.17400): the reward alone, through the last step alone."""
    return changed(reward_only(), {"gradient.mode": "last_k", "gradient.last_k": 1})


def draft_lv() -> RatsConfig:
    """DRaFT-LV: DRaFT-1 whose last step is repeated from new noise, for a gradient of lower variance."""
    return changed(reward_only(), {"gradient.mode": "low_variance"})


def constant_gate() -> RatsConfig:
    """RATS without the gate: shaping has the same weight whichever of the two scores higher."""
    return changed(shapes(), {"gate.kind": "constant"})


def confidence_gate() -> RatsConfig:
    """RATS that follows the teacher where the teacher's own picture scores well (docs/confidence-gate.md)."""
    return changed(shapes(), {"gate.kind": "confidence", "gate.tau_in_std": True})


def no_horizon() -> RatsConfig:
    """RATS that compares the last state alone."""
    return changed(shapes(), {"shaping.horizons": "end"})


def frozen_teacher() -> RatsConfig:
    """RATS whose teacher stays frozen."""
    return changed(shapes(), {"teacher.guided_steps": shapes().steps})


def steered() -> RatsConfig:
    """RATS that adjusts alpha while it trains, so that 85 % of the teacher's diversity is left."""
    return changed(shapes(), {"shaping.steer": 0.85, "validation.min_diversity": 0.82, "validation.every": 20})


def _paper(model: str, student_id: str, nfe: int, side_px: int) -> RatsConfig:
    """What the paper says of its runs: NFE against 50, bf16, 400 steps; the rest is our choice.

    PickScore and HPS v2.1 are tuned from one CLIP, so neither judges the other: ImageReward is held out.
    """
    return changed(
        RatsConfig(),
        {
            "model": model,
            "student.id": student_id,
            "reward.trained": "hpsv2.1",
            "reward.heldout": "imagereward",
            "data.prompts": "prompts.txt",
            "image.height_px": side_px,
            "image.width_px": side_px,
            "data.max_tokens": 0,
            "compute.weights": "bf16",
            "reward.weights": "bf16",
            "student.nfe": (nfe,),
            "teacher.nfe": 50,
            "steps": 400,
            "optim.batch": 1,
            "optim.accumulate": 8,
            "optim.lr": 1e-5,
            "lora.rank": 32,
            "gradient.mode": "detached",
            "compute.checkpointing": True,
            "gate.tau": 1.0,
            "gate.tau_in_std": True,
            "validation.batch": 4,
            "validation.every": 50,
            "validation.dinov2": "facebook/dinov2-base",
            "data.calibration": 64,
            "data.validation": 64,
            "data.validation_diversity": 8,
            "data.test": 256,
            "data.test_diversity": 16,
        },
    )


def flux_dev() -> RatsConfig:
    """FLUX.1-dev, 3 NFE at 512 px. The paper's step takes 7.57 s and 68 GB on one GPU; ours has 8 samples, so about
    8 times that (estimated: 7 h for 400 steps on an 80 GB GPU).
    """
    base = _paper("black-forest-labs/FLUX.1-dev", "flux-dev", 3, 512)
    return changed(base, {"data.max_tokens": 512, "teacher.guidance": 3.5, "teacher.batch": 4})


def sd35_medium() -> RatsConfig:
    """SD 3.5 medium, 5 NFE at 512 px: a fifth of FLUX's size, guided; estimated: 3 h on an 80 GB GPU.

    Its teacher needs guidance: guided and frozen for the first half, then the EMA of the student.
    """
    base = _paper("stabilityai/stable-diffusion-3.5-medium", "sd35-medium", 5, 512)
    return changed(
        base, {"teacher.guidance": 4.5, "teacher.guided_steps": 200, "teacher.batch": 8, "data.max_tokens": 256}
    )


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
    return changed(
        base,
        {
            "image.width_px": 832,
            "image.frames": 33,
            "reward.frames": 1,
            "teacher.guidance": 5.0,
            "teacher.negative_prompt": WAN_NEGATIVE,
            "teacher.guided_steps": 200,
            "optim.accumulate": 4,
            "validation.batch": 1,
            "data.test": 128,
            "data.test_diversity": 8,
        },
    )


def wan_22_5b() -> RatsConfig:
    """Wan 2.2 5B, text to video, 8 NFE at 704p, 33 frames: as many calls as wan-1.3b, of four times the weights."""
    return changed(
        wan_1_3b(),
        {
            "model": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "student.id": "wan-2.2-5b",
            "image.height_px": 704,
            "image.width_px": 1280,
        },
    )


def wan_14b() -> RatsConfig:
    """Wan 2.2 14B, two experts, text to video, 8 NFE at 480p, 33 frames: as many calls as wan-1.3b, of ten times the
    weights; three of the student's steps are the first expert's.
    """
    return changed(
        wan_1_3b(),
        {
            "model": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "student.id": "wan-2.2-14b",
            "teacher.guidance": 4.0,
            "teacher.guidance_2": 3.0,
        },
    )


def flux2_klein() -> RatsConfig:
    """FLUX.2 klein 4B from its undistilled base, 4 NFE at 512 px: 304,000 calls of the transformer (docs/cost.md).

    The base needs guidance by two calls: guided and frozen for the first half, then the EMA of the student.
    """
    base = _paper("black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein-4b", 4, 512)
    more = {"teacher.guidance": 4.0, "teacher.guided_steps": 200, "teacher.batch": 4, "data.max_tokens": 512}
    return changed(base, more)


def qwen_image() -> RatsConfig:
    """Qwen-Image 20 B, 8 NFE at 512 px: 368,000 calls, of a transformer that is 41 GB in bf16."""
    base = _paper("Qwen/Qwen-Image", "qwen-image", 8, 512)
    more = {
        "teacher.guidance": 4.0,
        "teacher.guided_steps": 200,
        "teacher.negative_prompt": " ",
        "teacher.batch": 2,
        "data.max_tokens": 512,
    }
    return changed(base, more)


def z_image_turbo() -> RatsConfig:
    """Z-Image-Turbo 6 B from its own 8 steps to 4, at 512 px: 89,600 calls, its teacher being unguided."""
    base = _paper("Tongyi-MAI/Z-Image-Turbo", "z-image-turbo", 4, 512)
    more = {"teacher.nfe": 8, "teacher.reference_nfe": 8, "teacher.batch": 4, "data.max_tokens": 512}
    return changed(base, more)


def consistency() -> RatsConfig:
    """Phased consistency distillation of the guided teacher (training/rats/peers.py)."""
    return changed(
        shapes(),
        {"method": "consistency", "teacher.guided_steps": shapes().steps, "teacher.ema": 0.95, "reward.weight": 0.0},
    )


def matching() -> RatsConfig:
    """DMD2-style distribution matching to the guided teacher (training/rats/peers.py)."""
    return changed(shapes(), {"method": "matching", "optim.lr": 5e-5, "reward.weight": 0.0})


PRESETS: dict[str, Callable[[], RatsConfig]] = {
    "shapes": shapes,
    "shapes-distillation": distillation,
    "shapes-reward-only": reward_only,
    "shapes-draft-1": draft_1,
    "shapes-draft-lv": draft_lv,
    "shapes-constant-gate": constant_gate,
    "shapes-confidence-gate": confidence_gate,
    "shapes-no-horizon": no_horizon,
    "shapes-frozen-teacher": frozen_teacher,
    "shapes-steered": steered,
    "shapes-consistency": consistency,
    "shapes-matching": matching,
    "flux-dev": flux_dev,
    "sd35-medium": sd35_medium,
    "wan-1.3b": wan_1_3b,
    "wan-2.2-5b": wan_22_5b,
    "wan-14b": wan_14b,
    "flux2-klein": flux2_klein,
    "qwen-image": qwen_image,
    "z-image-turbo": z_image_turbo,
}


def preset(name: str) -> RatsConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}: {hint}")
    return PRESETS[name]()
