"""Of every setting of a run: its default, the outermost values that it takes, and the first that it refuses.

And of the rules that tie settings together, each side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from training.config import ConfigError, leaves, with_settings
from training.rats.config import RatsConfig

GATES = ["reward", "confidence", "constant", "one", "batch_mean", "shuffled", "signed"]
TEXT: tuple[list[Any], list[Any]] = (["", "anything"], [])
SWITCH: tuple[list[Any], list[Any]] = ([True, False], [1, "yes"])
COUNT: tuple[list[Any], list[Any]] = ([1], [0])  # at least one
OR_NONE: tuple[list[Any], list[Any]] = ([0], [-1])  # 0 has a meaning
SHARE: tuple[list[Any], list[Any]] = ([0, 1], [-0.001, 1.001, math.nan])
ABOVE_0: tuple[list[Any], list[Any]] = ([1e-9], [0, -1, math.inf, math.nan])
NUMBER: tuple[list[Any], list[Any]] = ([-1e9, 1e9], [math.inf, math.nan])
ADAPTER = ["lora.rank=4"]
EDGES: dict[str, tuple[Any, tuple[list[Any], list[Any]]]] = {
    "model": ("models/shapes-teacher", TEXT),
    "method": ("rats", (["rats", "tune", "consistency", "matching"], ["dmd", ""])),
    "steps": (300, COUNT),
    "seed": (401, ([0, 2**32 - 1], [-1, 2**32])),
    "tracker": ("tensorboard", (["tensorboard", "wandb", "mlflow"], ["", "paper"])),
    "data.prompts": ("shapes", TEXT),
    "data.copies": (10, COUNT),
    "data.measuring": ("", TEXT),
    "data.calibration": (128, ([2], [1])),
    "data.validation": (256, COUNT),
    "data.validation_diversity": (32, COUNT),
    "data.test": (512, COUNT),
    "data.test_diversity": (64, COUNT),
    "data.max_tokens": (12, OR_NONE),
    "image.height_px": (64, COUNT),
    "image.width_px": (64, COUNT),
    "image.frames": (1, COUNT),
    "student.id": ("shapes", (["a", "x" * 64, "Flux-dev_3.1"], ["", "-x", ".x", "x" * 65, "a b", "a/b"])),
    "student.version": ("1", (["1", "x" * 64, "2.0-rc1"], ["", "-x", ".x", "x" * 65, "a b", "a/b"])),
    "student.nfe": ((4,), ([[1], [8, 4, 1]], [[0], [4, 4], [-1], []])),
    "student.init": ("", TEXT),
    "student.bundle": ("whole", (["whole"], ["part"])),
    "teacher.nfe": (16, COUNT),
    "teacher.reference_nfe": (50, COUNT),
    "teacher.guidance": (1.0, NUMBER),
    "teacher.guidance_2": (0.0, ([0], [math.inf, math.nan])),
    "teacher.negative_prompt": ("", TEXT),
    "teacher.guided_steps": (0, OR_NONE),
    "teacher.ema": (0.999, SHARE),
    "teacher.restart": (True, SWITCH),
    "teacher.batch": (0, OR_NONE),
    "teacher.weights": ("fp32", (["fp32", "bf16"], ["fp16"])),
    "reward.trained": ("models/shapes-scorers/trained", TEXT),
    "reward.heldout": ("models/shapes-scorers/heldout", TEXT),
    "reward.reported": ("", TEXT),
    "reward.weight": (1.0, ([0, 1e9], [-0.001, math.inf, math.nan])),
    "reward.hinge": (math.inf, ([-1, 0, math.inf], [math.nan])),
    "reward.frames": (0, OR_NONE),
    "reward.weights": ("fp32", (["fp32", "bf16"], ["fp16"])),
    "shaping.alpha": (1.0, ([0, 1e9], [-0.001, math.inf, math.nan])),
    "shaping.steer": (0.0, SHARE),
    "shaping.horizons": ("student", (["student", "end", "0.8,0.4,0", "0"], ["start", "1.0", "0.8,1", "-0.1", ""])),
    "shaping.l2_weight": (1.0, NUMBER),
    "shaping.cosine_weight": (0.5, NUMBER),
    "shaping.velocity_hinge": (math.inf, ([1e-9, math.inf], [0, -1, math.nan])),
    "gate.kind": ("reward", (GATES, ["open", ""])),
    "gate.tau": (1.0, ABOVE_0),
    "gate.tau_in_std": (False, SWITCH),
    "gradient.mode": ("full", (["full", "last_k", "detached", "low_variance"], ["none"])),
    "gradient.last_k": (1, COUNT),
    "gradient.bridge": (0.0, ([0], [-0.001, 1.001, math.nan, 0.5])),
    "tune.radius": (0.1, ABOVE_0),
    "tune.branches": (0, ([0, 2], [1, -1])),
    "tune.angle": (0.5, ABOVE_0),
    "tune.gate": (False, SWITCH),
    "optim.batch": (32, COUNT),
    "optim.accumulate": (1, COUNT),
    "optim.lr": (1e-4, ABOVE_0),
    "optim.warmup": (10, COUNT),
    "optim.decay": (0.0, SHARE),
    "optim.clip_norm": (1.0, ABOVE_0),
    "optim.state": ("fp32", (["fp32", "offload", "8bit", "paged"], ["4bit"])),
    "lora.rank": (0, OR_NONE),
    "lora.alpha": (64.0, ABOVE_0),
    "compute.device": ("auto", TEXT),
    "compute.weights": ("fp32", (["fp32"], ["fp16", "bf16"])),
    "compute.quantise": ("", ([""], ["nf4", "fp8", "int4"])),
    "compute.precision": ("bf16", (["bf16", "fp32"], ["fp16"])),
    "compute.checkpointing": (False, SWITCH),
    "compute.tile_px": (0, ([0, 64, 128], [-64, 1, 63, 65])),
    "compute.shard": (False, SWITCH),
    "compute.shard_frugal": (False, SWITCH),
    "compute.compile": ("", TEXT),
    "compute.save_minutes": (10.0, ([1e-9, math.inf], [0, -1])),
    "validation.every": (25, COUNT),
    "validation.patience": (0, OR_NONE),
    "validation.min_diversity": (0.9, SHARE),
    "validation.batch": (64, COUNT),
    "validation.dinov2": ("", TEXT),
}


def said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def refusal(settings: Sequence[str]) -> str:
    """Why a run may not have these settings; empty: it may."""
    try:
        with_settings(RatsConfig(), settings)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", EDGES)
def test_a_setting_has_its_default_and_its_edges(key: str) -> None:
    default, (accepted, refused) = EDGES[key]
    assert dict(leaves(RatsConfig()))[key] == default
    assert [value for value in accepted if refusal([f"{key}={said(value)}"])] == []
    assert [value for value in refused if key.rpartition(".")[2] not in refusal([f"{key}={said(value)}"])] == []


def test_every_setting_has_its_edges_here() -> None:
    assert set(dict(leaves(RatsConfig()))) == set(EDGES)


BF16 = [*ADAPTER, "compute.weights=bf16"]
RULES: list[tuple[list[str], list[str], str]] = [
    # accepted; refused; what the refusal begins with
    (["gradient.mode=last_k", "gradient.last_k=4"], ["gradient.mode=last_k", "gradient.last_k=5"], "gradient.last_k"),
    (["gradient.mode=full", "gradient.last_k=9"], ["student.nfe=[8,2]", "gradient.mode=last_k", "gradient.last_k=3"],
     "gradient.last_k"),
    (["gradient.mode=detached", "gradient.bridge=1"], ["gradient.mode=full", "gradient.bridge=1"], "gradient.bridge"),
    (["compute.shard=true", "method=consistency"], ["compute.shard=true", "method=matching"], "compute.shard"),
    (["compute.weights=bf16", "lora.rank=1"], ["compute.weights=bf16"], "compute.weights"),
    (["teacher.weights=bf16"], ["teacher.weights=bf16", "lora.rank=1"], "teacher.weights"),
    (["teacher.weights=bf16"], ["teacher.weights=bf16", "compute.precision=fp32"], "teacher.weights"),
    ([*BF16, "compute.quantise=nf4"], [*ADAPTER, "compute.quantise=nf4"], "compute.quantise"),
    ([*BF16, "compute.quantise=fp8"], [*BF16, "compute.quantise=fp8", "compute.shard=true"], "compute.quantise"),
    ([*BF16, "compute.quantise=fp8", "method=consistency"], [*BF16, "compute.quantise=fp8", "method=matching"],
     "compute.quantise"),
    (["optim.state=8bit"], ["optim.state=8bit", "compute.shard=true"], "optim.state"),
    (["optim.state=offload", "compute.shard=true"], ["optim.state=8bit", "compute.shard=true"], "optim.state"),
    (["optim.state=fp32", "compute.shard=true"], ["optim.state=paged", "compute.shard=true"], "optim.state"),
    ([*ADAPTER, "student.bundle=adapter"], ["student.bundle=adapter"], "student.bundle"),
    ([*ADAPTER, "student.init=x"], [*ADAPTER, "student.bundle=adapter", "student.init=x"], "student.bundle"),
    (["shaping.steer=0.9"], ["shaping.steer=0.9", "method=consistency"], "shaping.steer"),
    (["shaping.steer=0", "method=tune"], ["shaping.steer=0.9", "shaping.alpha=0"], "shaping.steer"),
    (["shaping.steer=1"], ["shaping.steer=0.9", "reward.weight=0"], "shaping.steer"),
    (["method=tune"], ["method=tune", "reward.weight=0"], "reward.weight"),
    (["reward.weight=0"], ["reward.weight=0", "shaping.alpha=0"], "reward.weight and shaping.alpha"),
    (["shaping.alpha=0"], ["shaping.alpha=0", "reward.weight=0"], "reward.weight and shaping.alpha"),
]  # fmt: skip


@pytest.mark.parametrize(("accepted", "refused", "begins"), RULES)
def test_settings_that_contradict_each_other_are_refused(accepted: list[str], refused: list[str], begins: str) -> None:
    assert refusal(accepted) == "" and refusal(refused).startswith(begins)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [([], True), (["reward.weight=0"], False), (["method=tune"], True), (["method=tune", "tune.branches=2"], False),
     (["tune.branches=2"], True)],
)  # fmt: skip
def test_a_reward_must_have_a_gradient_where_it_is_followed(settings: list[str], needed: bool) -> None:
    assert with_settings(RatsConfig(), settings).needs_gradient is needed
