"""The plan of the experiment in docs/science.md: which runs there are, in which order, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.config import changed
from training.experiment.presets import shapes
from training.lab.teachers import GOOD, HETEROGENEOUS
from training.rats.config import RatsConfig

NFES, SEEDS = (1, 2), (401, 402, 403, 404, 405)
ALPHAS, RATES = (2.0, 8.0, 20.0), (0.5, 1.0, 2.0)
STEPS, EVERY, LR = 150, 30, 4e-4
EVALUATED = 128  # of the test prompts, at every validation

RATS, CONSTANT, SHUFFLED, REWARD_ONLY = "RATS", "constant gate", "shuffled gate", "reward only"
DISTILLATION, CONFIDENCE = "distillation only", "confidence gate"
# What distinguishes a method from RATS.
METHODS: Mapping[str, Mapping[str, Any]] = {
    RATS: {},
    CONSTANT: {"gate.kind": "constant"},
    SHUFFLED: {"gate.kind": "shuffled"},
    REWARD_ONLY: {"shaping.alpha": 0.0},
    "batch-mean gate": {"gate.kind": "batch_mean"},
    "signed weight": {"gate.kind": "signed"},
    "disagreement gate": {"gate.kind": "disagreement"},
    DISTILLATION: {"reward.weight": 0.0, "gate.kind": "one"},
    CONFIDENCE: {"gate.kind": "confidence"},
}
MAIN = (RATS, CONSTANT, SHUFFLED, REWARD_ONLY)
GATES = (RATS, SHUFFLED, "batch-mean gate", "signed weight", "disagreement gate")  # of which the third claim takes one
# Seconds of one core, measured with 64 samples: the teacher's rollout and reward, the student's step, one validation.
TEACHER_S, STUDENT_S, VALIDATION_S, SETUP_S = 0.25, 0.5, 11.0, 8.0


@dataclass(frozen=True)
class Cell:
    """One training run; ``strength`` is its alpha, or what takes its place."""

    teacher: str
    method: str
    strength: str
    part: str
    config: RatsConfig

    @property
    def key(self) -> str:
        """The name of its folder."""
        words = (self.teacher, self.method, self.strength, f"seed{self.config.seed}")
        return "-".join(word.lower().replace(" ", "-") for word in words if word)

    @property
    def expected_s(self) -> float:
        """The approximate seconds that it takes on one core."""
        teacher = TEACHER_S if self.config.shaping.alpha > 0 else 0.0
        validations = 1 + self.config.steps / self.config.validation.every
        return SETUP_S + self.config.steps * (teacher + STUDENT_S) + validations * VALIDATION_S


def base(teacher: Path) -> RatsConfig:
    """What all runs share: one set of weights for 1 and 2 steps, one phase, and a teacher that is frozen at first.

    There is no lower limit on diversity: the outcome is read at every diversity.
    """
    return changed(
        shapes(),
        {
            "model": str(teacher),
            "student.id": "lab",
            "student.nfe": NFES,
            "steps": STEPS,
            "teacher.nfe": 4,
            "teacher.reference_nfe": 8,
            "teacher.guidance": 1.0,
            "teacher.guided_steps": STEPS // 2,
            "teacher.restart": False,
            "teacher.ema": 0.99,
            "gate.tau": 0.5,
            "gate.tau_in_std": True,
            "optim.batch": 64,
            "optim.lr": LR,
            "optim.decay": 0.0,
            "validation.every": EVERY,
            "validation.batch": 64,
            "validation.min_diversity": 0.0,
            "data.validation": 64,
            "data.validation_diversity": 4,
            "data.test": EVALUATED,
            "compute.save_minutes": 10_000.0,  # at validations alone, so that what is noted between them is complete
        },
    )


def cells(teachers: Path) -> list[Cell]:
    """All cells, the most important ones first; ``teachers`` is the folder of the two teachers.

    The main comparison is in the order of its seeds, so that methods can be compared after each of them.
    """
    others = [name for name in METHODS if name not in (*MAIN, CONFIDENCE)]
    plan: list[Cell] = []
    for teacher, main, more in ((HETEROGENEOUS, "main", "other methods"), (GOOD, "good teacher", "other methods")):
        for seed in SEEDS:
            plan += [cell for name in MAIN for cell in _sweep(teachers, teacher, name, main, seed)]
        plan += [cell for seed in SEEDS for cell in _sweep(teachers, teacher, CONFIDENCE, "confidence", seed)]
        plan += [cell for name in others for cell in _sweep(teachers, teacher, name, more, SEEDS[0])]
    return plan


def check(teachers: Path) -> Cell:
    """The run that says, before all others, whether reward only is trained for so long that the judge gets worse."""
    strongest = _sweep(teachers, HETEROGENEOUS, REWARD_ONLY, "check", SEEDS[0] - 1)[-1]
    return replace(strongest, config=changed(strongest.config, {"data.validation": EVALUATED}))


def _sweep(teachers: Path, teacher: str, method: str, part: str, seed: int) -> list[Cell]:
    """A method's runs with one teacher and seed: over alpha, or over what takes its place."""
    config = changed(base(teachers / teacher), {"seed": seed, **METHODS[method]})
    if method == DISTILLATION:  # nothing that alpha could be weighed against
        return [Cell(teacher, method, "", part, config)]
    if method == REWARD_ONLY:
        rates = {f"rate {rate:g}": changed(config, {"optim.lr": rate * LR}) for rate in RATES}
        return [Cell(teacher, method, name, part, changed_config) for name, changed_config in rates.items()]
    return [
        Cell(teacher, method, f"alpha {alpha:g}", part, changed(config, {"shaping.alpha": alpha})) for alpha in ALPHAS
    ]
