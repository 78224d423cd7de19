"""The laboratory's cells: which runs are compared, with how many seeds, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.rats.preset import RatsConfig, shapes

NFES, SEEDS = (2, 4, 8), (401, 402, 403)
# What distinguishes a method from RATS; docs/lab compares them at every step count with three seeds.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "RATS": {},
    "reward only": {"alpha": 0.0},
    "constant gate": {"gate": "constant"},
    "distillation only": {"reward_weight": 0.0, "gate": "one"},
}
# Our own form, in the same comparison.
VARIANTS: Mapping[str, Mapping[str, Any]] = {"RATS steered": {"steer": 0.85, "validate_every": 20}}
# At one step count with one seed: enough to see large effects, and marked as such.
BASELINES: Mapping[str, Mapping[str, Any]] = {
    "DRaFT-1": {"alpha": 0.0, "gradient": "last_k", "last_k": 1},
    "DRaFT-LV": {"alpha": 0.0, "gradient": "low_variance"},
    "no horizon": {"horizons": "end"},
    "frozen teacher": {"guided_steps": 120},
    "consistency": {"method": "consistency", "guided_steps": 120, "ema": 0.95, "reward_weight": 0.0},
    "distribution matching": {"method": "matching", "lr": 5e-5, "reward_weight": 0.0},
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "alpha 2": {"alpha": 2.0},
    "alpha 20": {"alpha": 20.0},
    "alpha 60": {"alpha": 60.0},
    "tau 0.15": {"tau": 0.15},
    "tau 2": {"tau": 2.0},
    "tau in spreads": {"tau_in_spreads": True},
    "EMA 0.9": {"ema": 0.9},
    "EMA 0.99": {"ema": 0.99},
    "eighths as horizons": {"horizons": "0.875,0.75,0.625,0.5,0.375,0.25,0.125,0"},
    "teacher of 16 steps": {"teacher_nfe": 16},
    "steered to 0.9": {"steer": 0.9, "validate_every": 20},
    "confidence gate": {"gate": "confidence"},
    "gradient: last 2": {"gradient": "last_k", "last_k": 2},
    "gradient: detached": {"gradient": "detached"},
}
ABLATION_NFE = 4
# Seconds on one core for 16 samples: half of the 2.4 s measured for 32 (8 guided teacher steps, 4 student steps with
# full gradient); how it splits into the teacher's part and one student step is estimated.
TEACHER_S, STUDENT_S, EVALUATION_S = 0.7, 0.13, 60.0


@dataclass(frozen=True)
class Cell:
    """One training run of the laboratory."""

    method: str
    part: str
    nfe: int
    config: RatsConfig

    @property
    def key(self) -> str:
        """The folder that its run lies in."""
        name = self.method.lower().replace(":", "").replace(" ", "-")
        return f"{name}-nfe{self.nfe}-seed{self.config.seed}"

    @property
    def expected_s(self) -> float:
        """About how long it takes on one core."""
        teacher = TEACHER_S * self.config.teacher_nfe / 8 if self.config.alpha > 0 else 0.0
        return self.config.steps * (teacher + STUDENT_S * self.nfe) + EVALUATION_S


def base() -> RatsConfig:
    """The starter world's preset, shorter and with smaller batches, so that many runs fit into a night.

    Nothing is asked of diversity, so that a method which loses it shows that it does.
    """
    small: dict[str, Any] = {"steps": 120, "batch": 16, "guided_steps": 80, "validate_every": 40}
    return replace(shapes(), min_diversity=0.0, student_id="lab", **small)


def cells() -> list[Cell]:
    """All cells, the most important ones first."""
    main = [
        _cell(method, "main", change, nfe, seed)
        for nfe in (4, 2, 8)
        for seed in SEEDS
        for method, change in {**METHODS, **VARIANTS}.items()
    ]
    one_seed = [
        _cell(method, part, change, ABLATION_NFE, SEEDS[0])
        for part, group in (("baseline", BASELINES), ("ablation", ABLATIONS))
        for method, change in group.items()
    ]
    return [*main, *one_seed]


def _cell(method: str, part: str, change: Mapping[str, Any], nfe: int, seed: int) -> Cell:
    return Cell(method, part, nfe, replace(base(), nfe=(nfe,), seed=seed, **change))
