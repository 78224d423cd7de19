"""RATS runs as rows: a preset is a function that returns a complete configuration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from training.config import ConfigError
from training.rats.gradients import MODES

GATES = ("reward", "constant", "one")
HORIZONS = ("student", "end")
PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class RatsConfig:
    """One RATS run. What the paper (arXiv 2604.14910) does not publish is our own choice: alpha, tau, l2_weight,
    cosine_weight, ema, lr, and the horizons (the student's own sigmas).

    ``steps`` are optimizer steps, each of ``batch`` x ``accumulate`` samples a process. While ``step < guided_steps``
    the teacher is the frozen start, guided with ``guidance``; afterwards it is the EMA of the student, unguided.
    """

    # What is trained, and on what.
    model: str = "models/shapes-teacher"
    scorer: str = "models/shapes-scorers/trained"
    heldout: str = "models/shapes-scorers/heldout"
    student_id: str = "shapes"
    version: str = "1"
    # Student and teacher.
    nfe: tuple[int, ...] = (4,)  # one of them is drawn at each step
    teacher_nfe: int = 16
    reference_nfe: int = 50
    guidance: float = 1.0
    guided_steps: int = 0
    ema: float = 0.999  # 1 keeps the teacher as it was at the start
    # The objective.
    reward_weight: float = 1.0
    reward_hinge: float = math.inf  # rewards above it count no more
    alpha: float = 1.0
    gate: str = "reward"  # "constant": 0.5 everywhere; "one": 1 everywhere
    tau: float = 1.0
    tau_in_spreads: bool = False  # tau times the running deviation of the gap
    horizons: str = "student"  # "end": the last state alone
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
    checkpointing: bool = False
    # Looking at it.
    validate_every: int = 25
    patience: int = 0  # stop after so many validations without a better held-out score; 0 never
    diversity_prompts: int = 64
    seed: int = 401

    def check(self) -> None:
        """Raise ConfigError for a value that no run can use, before anything is loaded."""
        for name in ("teacher_nfe", "reference_nfe", "steps", "batch", "accumulate", "validate_every", "last_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is 1 or more")
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) < len(self.nfe):
            raise ConfigError(f"nfe is {list(self.nfe)}: accepted is a list of different step counts of 1 or more")
        for name in ("lr", "tau", "clip_norm", "velocity_hinge", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is more than 0")
        for name in ("reward_weight", "alpha", "lora_rank", "patience"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is 0 or more")
        for name in ("ema", "lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: accepted is 0 to 1")
        known = {"gate": GATES, "horizons": HORIZONS, "gradient": MODES, "precision": PRECISIONS}
        for name, accepted in known.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: accepted are {', '.join(accepted)}")
        if self.gradient == "last_k" and self.last_k > min(self.nfe):
            raise ConfigError(f"last_k is {self.last_k}: accepted is 1 to {min(self.nfe)}, the fewest steps of nfe")
        if self.reward_weight == 0 and self.alpha == 0:
            raise ConfigError("reward_weight and alpha are both 0: there is nothing to train on")

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


def distillation() -> RatsConfig:
    """The teacher's trajectory alone: no reward, and a gate that is always open."""
    return replace(shapes(), reward_weight=0.0, gate="one")


def reward_only() -> RatsConfig:
    """The reward alone, through all steps (ReFL and DRaFT's form for a few-step student)."""
    return replace(shapes(), alpha=0.0)


def draft_1() -> RatsConfig:
    """DRaFT-1 (arXiv 2309.17400): the reward alone, through the last step alone."""
    return replace(reward_only(), gradient="last_k", last_k=1)


def constant_gate() -> RatsConfig:
    """RATS without the gate: shaping counts the same whoever is ahead."""
    return replace(shapes(), gate="constant")


def no_horizon() -> RatsConfig:
    """RATS that compares the last state alone."""
    return replace(shapes(), horizons="end")


def frozen_teacher() -> RatsConfig:
    """RATS whose teacher never follows the student."""
    return replace(shapes(), guided_steps=shapes().steps)


PRESETS: dict[str, Callable[[], RatsConfig]] = {
    "shapes": shapes,
    "shapes-distillation": distillation,
    "shapes-reward-only": reward_only,
    "shapes-draft-1": draft_1,
    "shapes-constant-gate": constant_gate,
    "shapes-no-horizon": no_horizon,
    "shapes-frozen-teacher": frozen_teacher,
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
