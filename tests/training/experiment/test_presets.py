"""What each ready-made run is: every setting in which it differs from the defaults, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import WanPipeline

from training.config import leaves
from training.experiment.presets import PRESETS
from training.rats.config import RatsConfig

STARTER = {
    "steps": 460, "teacher.nfe": 8, "teacher.guidance": 2.5, "teacher.guided_steps": 400, "shaping.alpha": 8.0,
    "gate.tau": 0.5, "optim.lr": 1.5e-4, "optim.decay": 0.4, "validation.every": 40, "validation.batch": 16,
}  # fmt: skip
# As the paper has it (arXiv 2604.14910): against 50 steps, 400 steps of training, bf16; and our own choice.
PAPER = {
    "steps": 400, "teacher.nfe": 50, "compute.weights": "bf16", "reward.weights": "bf16", "reward.trained": "hpsv2.1",
    "reward.heldout": "imagereward", "data.prompts": "prompts.txt", "image.height_px": 512, "image.width_px": 512,
    "data.max_tokens": 512, "optim.batch": 1, "optim.accumulate": 8, "optim.lr": 1e-5, "lora.rank": 32,
    "gradient.mode": "detached", "compute.checkpointing": True, "gate.tau_in_std": True, "validation.batch": 4,
    "validation.every": 50, "validation.dinov2": "facebook/dinov2-base", "data.calibration": 64, "data.validation": 64,
    "data.validation_diversity": 8, "data.test": 256, "data.test_diversity": 16,
}  # fmt: skip
TWO_PHASES = {"teacher.guided_steps": 200}
WAN = {
    **PAPER, **TWO_PHASES, "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "student.id": "wan-1.3b", "student.nfe": (8,),
    "image.height_px": 480, "image.width_px": 832, "image.frames": 33, "reward.frames": 1, "teacher.guidance": 5.0,
    "data.max_tokens": 0, "optim.accumulate": 4, "validation.batch": 1, "data.test": 128, "data.test_diversity": 8,
    "teacher.negative_prompt": ...,
}  # fmt: skip
DIFFERING: dict[str, dict[str, Any]] = {
    "shapes": STARTER,
    "shapes-distillation": {**STARTER, "reward.weight": 0.0, "gate.kind": "one"},
    "shapes-reward-only": {**STARTER, "shaping.alpha": 0.0},
    "shapes-draft-1": {**STARTER, "shaping.alpha": 0.0, "gradient.mode": "last_k"},
    "shapes-draft-lv": {**STARTER, "shaping.alpha": 0.0, "gradient.mode": "low_variance"},
    "shapes-constant-gate": {**STARTER, "gate.kind": "constant"},
    "shapes-confidence-gate": {**STARTER, "gate.kind": "confidence", "gate.tau_in_std": True},
    "shapes-no-horizon": {**STARTER, "shaping.horizons": "end"},
    "shapes-frozen-teacher": {**STARTER, "teacher.guided_steps": 460},
    "shapes-steered": {**STARTER, "shaping.steer": 0.85, "validation.min_diversity": 0.82, "validation.every": 20},
    "shapes-consistency": {
        **STARTER, "method": "consistency", "teacher.guided_steps": 460, "teacher.ema": 0.95, "reward.weight": 0.0,
    },
    "shapes-matching": {**STARTER, "method": "matching", "optim.lr": 5e-5, "reward.weight": 0.0},
    "flux-dev": {
        **PAPER, "model": "black-forest-labs/FLUX.1-dev", "student.id": "flux-dev", "student.nfe": (3,),
        "teacher.guidance": 3.5, "teacher.batch": 4,
    },
    "sd35-medium": {
        **PAPER, **TWO_PHASES, "model": "stabilityai/stable-diffusion-3.5-medium", "student.id": "sd35-medium",
        "student.nfe": (5,), "teacher.guidance": 4.5, "teacher.batch": 8, "data.max_tokens": 256,
    },
    "wan-1.3b": WAN,
    "wan-2.2-5b": {
        **WAN, "model": "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "student.id": "wan-2.2-5b", "image.height_px": 704,
        "image.width_px": 1280,
    },
    "wan-14b": {
        **WAN, "model": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "student.id": "wan-2.2-14b", "teacher.guidance": 4.0,
        "teacher.guidance_2": 3.0,
    },
    "flux2-klein": {
        **PAPER, **TWO_PHASES, "model": "black-forest-labs/FLUX.2-klein-base-4B", "student.id": "flux2-klein-4b",
        "teacher.guidance": 4.0, "teacher.batch": 4,
    },
    "qwen-image": {
        **PAPER, **TWO_PHASES, "model": "Qwen/Qwen-Image", "student.id": "qwen-image", "student.nfe": (8,),
        "teacher.guidance": 4.0, "teacher.batch": 2, "teacher.negative_prompt": " ",
    },
    "z-image-turbo": {
        **PAPER, "model": "Tongyi-MAI/Z-Image-Turbo", "student.id": "z-image-turbo", "teacher.nfe": 8,
        "teacher.reference_nfe": 8, "teacher.batch": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERING)
def test_a_preset_differs_from_the_defaults_in_these_settings_alone(name: str) -> None:
    defaults, found = dict(leaves(RatsConfig())), dict(leaves(PRESETS[name]()))
    differing = {key: value for key, value in found.items() if value != defaults[key]}
    expected = dict(DIFFERING[name])
    if expected.get("teacher.negative_prompt") is ...:
        expected["teacher.negative_prompt"] = differing["teacher.negative_prompt"]
    assert differing == expected


def test_every_preset_is_here() -> None:
    assert set(PRESETS) == set(DIFFERING)


def test_what_wan_is_guided_away_from_is_what_its_pipelines_own_example_says() -> None:
    """Up to the example's commas, of which diffusers has lost one."""
    from diffusers.pipelines.wan import pipeline_wan

    example = " ".join(pipeline_wan.EXAMPLE_DOC_STRING.split()) + inspect.getdoc(WanPipeline)
    assert PRESETS["wan-1.3b"]().teacher.negative_prompt in example
