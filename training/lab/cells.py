"""The cells of the comparison: which runs there are, with how many seeds, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.config import changed
from training.experiment.presets import shapes
from training.rats.config import RatsConfig

NFES, SEEDS = (2, 4, 8), (401, 402, 403)
# What distinguishes a method from RATS; docs/lab compares them at every step count with three seeds.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "RATS": {},
    "reward only": {"shaping.alpha": 0.0},
    "constant gate": {"gate.kind": "constant"},
    "distillation only": {"reward.weight": 0.0, "gate.kind": "one"},
}
# Our own form, in the same comparison.
VARIANTS: Mapping[str, Mapping[str, Any]] = {"RATS steered": {"shaping.steer": 0.85, "validation.every": 20}}
# At one step count with one seed: enough to see large effects, and marked as such.
BASELINES: Mapping[str, Mapping[str, Any]] = {
    "DRaFT-1": {"shaping.alpha": 0.0, "gradient.mode": "last_k", "gradient.last_k": 1},
    "DRaFT-LV": {"shaping.alpha": 0.0, "gradient.mode": "low_variance"},
    "no horizon": {"shaping.horizons": "end"},
    "frozen teacher": {"teacher.guided_steps": 120},
    "consistency": {"method": "consistency", "teacher.guided_steps": 120, "teacher.ema": 0.95, "reward.weight": 0.0},
    "distribution matching": {"method": "matching", "optim.lr": 5e-5, "reward.weight": 0.0},
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "alpha 2": {"shaping.alpha": 2.0},
    "alpha 20": {"shaping.alpha": 20.0},
    "alpha 60": {"shaping.alpha": 60.0},
    "tau 0.15": {"gate.tau": 0.15},
    "tau 2": {"gate.tau": 2.0},
    "tau in spreads": {"gate.tau_in_std": True},
    "EMA 0.9": {"teacher.ema": 0.9},
    "EMA 0.99": {"teacher.ema": 0.99},
    "eighths as horizons": {"shaping.horizons": "0.875,0.75,0.625,0.5,0.375,0.25,0.125,0"},
    "teacher of 16 steps": {"teacher.nfe": 16},
    "steered to 0.9": {"shaping.steer": 0.9, "validation.every": 20},
    "confidence gate": {"gate.kind": "confidence"},
    "gradient: last 2": {"gradient.mode": "last_k", "gradient.last_k": 2},
    "gradient: detached": {"gradient.mode": "detached"},
}
ABLATION_NFE = 4
# Seconds on one core for 16 samples: half of the 2.4 s measured for 32 (8 guided teacher steps, 4 student steps with
# full gradient); how it splits into the teacher's part and one student step is estimated.
TEACHER_S, STUDENT_S, EVALUATION_S = 0.7, 0.13, 60.0


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    method: str
    part: str
    nfe: int
    config: RatsConfig

    @property
    def key(self) -> str:
        """The name of its folder."""
        name = self.method.lower().replace(":", "").replace(" ", "-")
        return f"{name}-nfe{self.nfe}-seed{self.config.seed}"

    @property
    def expected_s(self) -> float:
        """The approximate seconds that it takes on one core."""
        teacher = TEACHER_S * self.config.teacher.nfe / 8 if self.config.shaping.alpha > 0 else 0.0
        return self.config.steps * (teacher + STUDENT_S * self.nfe) + EVALUATION_S


def base() -> RatsConfig:
    """The starter world's preset, shorter and with smaller batches, so that many runs fit into a night.

    There is no lower limit on diversity, so that the report shows which methods lose it.
    """
    small: dict[str, Any] = {"steps": 120, "optim.batch": 16, "teacher.guided_steps": 80, "validation.every": 40}
    return changed(shapes(), {"validation.min_diversity": 0.0, "student.id": "lab", **small})


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
    return Cell(method, part, nfe, changed(base(), {"student.nfe": (nfe,), "seed": seed, **change}))
