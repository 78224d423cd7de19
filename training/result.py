"""The bundle that a RATS run leaves: pipeline, student.json, model card, sample grid and curves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from student.bundle import ImageSize, Latents, RewardReference, Scorer, Student, write_student
from student.families.family import Family
from student.pipeline import open_pipeline, read_index, save_pipeline, shift_no_more
from training import figures
from training.card import card
from training.evaluate import Evaluation, mean_error
from training.instruments import HELDOUT, TRAINED, Scale, standardise
from training.origin import origin
from training.progress import read_log
from training.rats.preset import RatsConfig

ROLES = (TRAINED, HELDOUT)


@dataclass(frozen=True)
class Outcome:
    """All that the bundle is written from; ``table`` is the teacher's rows, then the student's."""

    config: RatsConfig
    model: Family
    latents: Latents
    image: ImageSize
    scale: Scale
    table: Sequence[Evaluation]
    pictures: Mapping[str, Tensor]


def save(out: Path, teacher: str, transformer: Any) -> None:
    """Write the student's pipeline into ``out``: the teacher's, with another transformer and scheduler.

    The encoders may have been dropped while it trained: what did not learn is read again from the teacher.
    """
    pipe = open_pipeline(teacher, local_files_only=False, transformer=transformer)
    shift_no_more(pipe)
    save_pipeline(pipe, out)


def write(out: Path, outcome: Outcome) -> Student:
    """Write manifest, card and pictures beside the pipeline that ``save`` wrote; the run's own lie in ``run``."""
    student = write_student(out, manifest(outcome))
    figures.grid(outcome.pictures, out / "grid.png")
    figures.curves(read_log(out / "run" / "log.jsonl"), out / "curves.png")
    alarms = (out / "run" / "alarms.txt").read_text().splitlines()
    teacher = origin(outcome.config.model)
    if teacher.terms:
        shutil.copyfile(teacher.terms, out / teacher.terms.name)
    text = card(student, outcome.config, outcome.table, outcome.scale, teacher, read_index(out), alarms)
    (out / "README.md").write_text(text)
    return student


def manifest(outcome: Outcome) -> Student:
    """What student.json says."""
    config, model = outcome.config, outcome.model
    student_rows = [row for row in outcome.table if row.label == "student"]
    # Only the starter world's scorers can be compiled into a bundle; they are one for each role.
    compiled = {one.name: one for one in outcome.scale.instruments if Path(one.asked.removeprefix("shapes:")).is_dir()}
    return Student(
        id=config.student_id,
        version=config.version,
        family=model.name,
        steps=config.nfe,
        sigmas={nfe: model.sigmas(nfe, outcome.latents.shape) for nfe in config.nfe},
        latents=outcome.latents,
        image=outcome.image,
        max_tokens=model.max_tokens,
        baked=model.baked,
        teacher=origin(config.model).name,
        scorers={
            name: Scorer(
                f"scorers/{name}.onnx",
                outcome.scale.calibration[name].mean,
                outcome.scale.calibration[name].std,
                one.role,  # type: ignore[arg-type]
                one.source,
            )
            for name, one in compiled.items()
        },
        reward_reference={
            name: _reference(standardise(outcome.scale.calibration[name], student_rows[0].scores[name]))
            for name in compiled
        },
        evaluation=tuple(_row(outcome, row) for row in outcome.table),
    )


def _reference(values: Sequence[float]) -> RewardReference:
    points = {str(p): float(np.percentile(values, p)) for p in (1, 5, 25, 50, 75, 95, 99)}
    return RewardReference(float(np.mean(values)), float(np.std(values, ddof=1)), points)


def _row(outcome: Outcome, row: Evaluation) -> dict[str, Any]:
    values = {role: outcome.scale.standardised(row, role) for role in ROLES}
    values |= {f"judge_{name}": list(part) for name, part in row.judge.items()}
    values["diversity"] = row.diversity
    figures_of = {name: dict(zip(("mean", "error"), mean_error(part), strict=True)) for name, part in values.items()}
    num = len(values[TRAINED])
    return {"model": row.label, "nfe": row.nfe, "guidance": row.guidance, "prompts": num, **figures_of}
