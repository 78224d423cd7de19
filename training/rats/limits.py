"""What a RATS run's settings may be: alone, and together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from student.bundle import NAME
from training.config import ConfigError
from training.rats.gradients import MODES
from training.rats.trajectory import named_horizons

WORDS = {
    "method": ("rats", "consistency", "matching"),
    "gate": ("reward", "confidence", "constant", "one"),
    "gradient": MODES,
    "precision": ("bf16", "fp32"),
    "weights": ("bf16", "fp32"),
}
COUNTS: tuple[str, ...] = ("teacher_nfe", "reference_nfe", "steps", "batch", "accumulate", "warmup", "validate_every")
COUNTS += ("last_k", "height_px", "width_px", "frames", "draw_batch")
COUNTS += ("validation_prompts", "watched_prompts", "test_prompts", "diversity_prompts")
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (COUNTS, lambda value: value >= 1, "1 or more"),
    (("lr", "tau", "clip_norm", "velocity_hinge", "lora_alpha"), lambda value: value > 0, "more than 0"),
    (
        ("reward_weight", "reward_frames", "alpha", "lora_rank", "patience", "guided_steps", "max_tokens"),
        lambda value: value >= 0,
        "0 or more",
    ),
    (("ema", "lr_decay", "min_diversity", "steer"), lambda value: 0 <= value <= 1, "0 to 1"),
    (("calibration_prompts",), lambda value: value >= 2, "2 or more"),
    (("seed",), lambda value: 0 <= value < 2**32, "0 to 4294967295"),
)
MAY_BE_INFINITE = ("reward_hinge", "velocity_hinge")  # which is how they are off
NAMES = "up to 64 letters from a to z, digits, '.', '_' and '-', with a letter or digit first"  # NAME, in words
# What cannot be, or does not go together: when, and what to say of it.
TOGETHER: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda c: not NAME.fullmatch(c.student_id),
        f"student_id is {{c.student_id!r}}: accepted are {NAMES}",
    ),
    (
        lambda c: not NAME.fullmatch(c.version),
        f"version is {{c.version!r}}: accepted are {NAMES}",
    ),
    (
        lambda c: not c.nfe or min(c.nfe) < 1 or len(set(c.nfe)) < len(c.nfe),
        "nfe is {c.nfe}: accepted is a list of different step counts of 1 or more",
    ),
    (
        lambda c: c.gradient == "last_k" and c.last_k > min(c.nfe),
        "last_k is {c.last_k}: accepted is 1 to the fewest steps of nfe, which is {c.nfe}",
    ),
    (
        lambda c: c.shard and c.method == "matching",
        "shard is true: accepted with every method but matching, whose critic is not spread",
    ),
    (
        lambda c: c.weights == "bf16" and not c.lora_rank,
        "weights is 'bf16' with lora_rank 0: small updates of bf16 weights round to nothing; accepted are lora_rank of "
        "1 or more, or weights=fp32 (with precision=bf16 it still computes in bf16)",
    ),
    (
        lambda c: c.steer and (c.method != "rats" or c.alpha == 0 or c.reward_weight == 0),
        "steer is {c.steer}: it leads alpha, so it needs method rats, a reward and an alpha",
    ),
    (
        lambda c: c.reward_weight == 0 and c.alpha == 0,
        "reward_weight and alpha are both 0: there is nothing to train on",
    ),
)


def check(config: Any) -> None:
    """Raise ConfigError for a RatsConfig that no run can use, before anything is loaded."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not (math.isfinite(value) or (name in MAY_BE_INFINITE and value == math.inf)):
            raise ConfigError(f"{name} is {value}: accepted is a finite number")
    for names, holds, accepted in RANGES:
        for name in names:
            if not holds(getattr(config, name)):
                raise ConfigError(f"{name} is {getattr(config, name)}: accepted is {accepted}")
    for name, known in WORDS.items():
        if getattr(config, name) not in known:
            raise ConfigError(f"{name} is {getattr(config, name)!r}: accepted are {', '.join(known)}")
    try:
        named_horizons(config.horizons, (1.0,))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for forbidden, sentence in TOGETHER:
        if forbidden(config):
            raise ConfigError(sentence.format(c=config))
