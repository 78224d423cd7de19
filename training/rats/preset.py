"""RATS runs as rows: a preset is a function that returns a complete configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.config import ConfigError


@dataclass(frozen=True)
class RatsConfig:
    """One RATS run. What the paper (arXiv 2604.14910) does not publish is our own choice: alpha, tau,
    l2_weight, cosine_weight, ema, lr, and the horizons (the student's own sigmas).

    ``steps`` are optimizer steps. While ``step < guided_steps`` the teacher is the frozen start,
    guided with ``guidance``; afterwards it is the EMA of the student, without guidance.
    """

    model: str = "models/shapes-teacher"
    scorer: str = "models/shapes-scorers/trained"
    heldout: str = "models/shapes-scorers/heldout"
    student_id: str = "shapes"
    version: str = "1"
    nfe: int = 4
    teacher_nfe: int = 16
    reference_nfe: int = 50
    guidance: float = 1.0
    guided_steps: int = 0
    steps: int = 300
    batch: int = 32
    lr: float = 1e-4
    clip_norm: float = 1.0
    alpha: float = 1.0
    tau: float = 1.0
    l2_weight: float = 1.0
    cosine_weight: float = 0.5
    ema: float = 0.999
    validate_every: int = 25
    diversity_prompts: int = 64
    seed: int = 401

    def check(self) -> None:
        """Raise ConfigError for a value that no run can use, before anything is loaded."""
        for name in ("nfe", "teacher_nfe", "reference_nfe", "steps", "batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is 1 or more")
        for name in ("lr", "tau", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is more than 0")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}: accepted is 0 <= ema < 1")

    def check_paths(self) -> None:
        """Raise ConfigError where a model or a scorer is not where the configuration says."""
        for name in ("model", "scorer", "heldout"):
            if not Path(getattr(self, name)).is_dir():
                raise ConfigError(f"{name} is {getattr(self, name)!r}: there is no such folder")


def shapes() -> RatsConfig:
    """The starter world: about 3 s a step on one core. The teacher's guidance is baked into the student."""
    return RatsConfig(
        teacher_nfe=8,
        guidance=2.5,
        guided_steps=140,
        steps=200,
        lr=2e-4,
        validate_every=40,
    )


PRESETS: dict[str, Callable[[], RatsConfig]] = {"shapes": shapes}


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
