"""The bundle that a RATS run leaves: pipeline, student.json, model card, sample grid and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from student.bundle import ImageSize, Latents, RewardReference, Scorer, Student, write_student
from student.pipeline import save_pipeline
from student.schedule import sigmas
from training import figures
from training.card import card
from training.evaluate import Evaluation, mean_error
from training.progress import read_log
from training.rats.preset import RatsConfig
from training.shapes import vocabulary

ROLES = ("trained", "heldout")


@dataclass(frozen=True)
class Calibration:
    """Mean and deviation of a scorer's raw scores of the teacher on the calibration prompts."""

    mean: float
    std: float
    source_sha256: str

    @staticmethod
    def of(scores: Sequence[float], source_sha256: str) -> Calibration:
        """The calibration that these raw scores give."""
        return Calibration(float(np.mean(scores)), float(np.std(scores, ddof=1)), source_sha256)

    def standardise(self, scores: Sequence[float]) -> list[float]:
        """Raw scores in the teacher's deviations above the teacher's mean."""
        return [(score - self.mean) / self.std for score in scores]


@dataclass(frozen=True)
class Outcome:
    """All that the bundle is written from; ``table`` is teacher, teacher at few steps, student."""

    config: RatsConfig
    pipe: Any
    latents: Latents
    image: ImageSize
    calibration: Mapping[str, Calibration]
    table: Sequence[Evaluation]
    pictures: Mapping[str, Tensor]

    def standardised(self, name: str, row: Evaluation) -> list[float]:
        """One row's scores of scorer ``name`` in units of the teacher's deviation."""
        return self.calibration[name].standardise(row.scores[name])


def write(out: Path, outcome: Outcome) -> Student:
    """Write everything into ``out``; the run's own files stay in ``out/run``."""
    save_pipeline(outcome.pipe, out)
    student = write_student(out, manifest(outcome))
    figures.grid(outcome.pictures, out / "grid.png")
    figures.curves(read_log(out / "run" / "log.jsonl"), out / "curves.png")
    (out / "README.md").write_text(card(student, outcome.config, outcome.table, outcome.calibration))
    return student


def manifest(outcome: Outcome) -> Student:
    """What student.json says."""
    config = outcome.config
    student_row = next(row for row in outcome.table if (row.label, row.nfe) == ("student", config.nfe[0]))
    scorers = {
        name: Scorer(f"scorers/{name}.onnx", kept.mean, kept.std, name, kept.source_sha256)  # type: ignore[arg-type]
        for name, kept in outcome.calibration.items()
    }
    reference = {name: _reference(outcome.standardised(name, student_row)) for name in outcome.calibration}
    return Student(
        id=config.student_id,
        version=config.version,
        family="flux",
        steps=config.nfe,
        sigmas={row.nfe: sigmas(row.nfe) for row in outcome.table if row.label == "student"},
        latents=outcome.latents,
        image=outcome.image,
        max_tokens=vocabulary.MAX_TOKENS,
        baked={},
        teacher=Path(config.model).name,
        scorers=scorers,
        reward_reference=reference,
        evaluation=tuple(_row(outcome, row) for row in outcome.table),
    )


def _reference(values: Sequence[float]) -> RewardReference:
    points = {str(p): float(np.percentile(values, p)) for p in (1, 5, 25, 50, 75, 95, 99)}
    return RewardReference(float(np.mean(values)), float(np.std(values, ddof=1)), points)


def _row(outcome: Outcome, row: Evaluation) -> dict[str, Any]:
    values = {name: outcome.standardised(name, row) for name in outcome.calibration}
    values |= {f"judge_{name}": list(part) for name, part in row.judge.items()}
    values["diversity"] = row.diversity
    figures_of = {name: dict(zip(("mean", "error"), mean_error(part), strict=True)) for name, part in values.items()}
    num = len(row.judge["right"])
    return {"model": row.label, "nfe": row.nfe, "guidance": row.guidance, "prompts": num, **figures_of}
