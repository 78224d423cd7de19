"""The student's model card: what it is, how it was evaluated, how it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from student.base import NETWORKS
from student.bundle import Student
from student.families.two_experts import called_at
from training.evaluate import DIVERSITY, Evaluation, mean_error, paired
from training.origin import Origin
from training.rats.config import RatsConfig
from training.scorers import DIVERSITY_DINOV2, HELDOUT, REPORTED, TRAINED, Rewards
from training.usage import usage

SPREAD = {DIVERSITY_DINOV2: "diversity (DINOv2)"}
JUDGED = {"right": "fully right", "right_but_shape": "right but shape", "color": "colour", "shape": "shape"}


PIPELINE_TAGS = {"wan": "text-to-video"}
METHODS = {
    "rats": ("trained with RATS", "trained by fewstep with reward-aware trajectory shaping (RATS, arXiv 2604.14910)"),
    "tune": ("tuned by a reward", "tuned by fewstep along a reward's gradient, within bounds (after arXiv 2608.24646)"),
    "consistency": ("made by consistency", "trained by fewstep with consistency distillation, without a reward"),
    "matching": ("made by matching", "trained by fewstep with distribution matching, without a reward"),
}
FEW_STEPS, FEW_PROMPTS = 50, 100


def card(
    student: Student,
    config: RatsConfig,
    table: Sequence[Evaluation],
    rewards: Rewards,
    teacher: Origin,
    index: Mapping[str, Any],
    alarms: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> str:
    """The card's Markdown, in the hub's form.

    ``index`` is the content of model_index.json; ``alarms`` are the signs of reward hacking that the run found;
    ``prompts`` are those of the table's figures.
    """
    num = len(rewards[TRAINED].of_raw(table[0].scores))
    judged = "; the exact judge was not used for that" if table[0].judge else ""
    title, how = METHODS[config.method]
    return "\n".join(
        [
            _front_matter(student, teacher),
            f"# {student.id}: a {' or '.join(map(str, config.student.nfe))}-step student {title}\n",
            f"{_untrained(student)}{_short(config, num)}Student of `{student.teacher}`, {how}. "
            f"{_beginning(config)}{_guidance(student)}{_experts(student, config, index)}\n",
            f"{_licence(teacher)}\n",
            "![teacher and student on the same prompts and seeds](grid.png)\n",
            "## Evidence\n",
            f"{num} held-out test prompts, prompt i with seed i; mean ± standard error, clustered by prompt. The "
            "student was opened from these files. Scores are in standard deviations of the teacher above the teacher's "
            f"mean on calibration prompts. The checkpoint (after {student.chosen_at} of {config.steps} steps) was "
            f"chosen by the held-out scorer on validation prompts{judged}. Diversity is the Vendi score of 8 seeds "
            f"({len(table[0].diversity)} prompts) on autoencoder latents{_further(table[0])}.\n",
            _table(table, rewards, prompts),
            "## Paired differences, student minus teacher at its full step count\n",
            _differences(table, rewards, prompts),
            "## Use\n",
            usage(student, index, config.compute.weights, config.model if config.student.bundle == "adapter" else ""),
            "## Training\n",
            "![curves](curves.png)\n",
            "Signs of reward hacking: " + ("; ".join(alarms) if alarms else "none") + ".\n",
            f"```json\n{json.dumps(asdict(config), indent=2)}\n```\n",
        ]
    )


def _front_matter(student: Student, teacher: Origin) -> str:
    data = ModelCardData(
        license=teacher.license or None,
        license_name=teacher.license_name or None,
        license_link=(teacher.terms.name if teacher.terms and teacher.license_link else teacher.license_link) or None,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS.get(student.family, "text-to-image"),
        base_model=teacher.name,
        tags=["few-step", "rats", "fewstep"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _short(config: RatsConfig, num: int) -> str:
    if config.steps < FEW_STEPS:
        return f"**A short run: {config.steps} steps, evaluated on {num} prompts only.**\n\n"
    return f"**Evaluated on {num} prompts only.**\n\n" if num < FEW_PROMPTS else ""


def _untrained(student: Student) -> str:
    if student.chosen_at != 0:
        return ""
    return (
        "**Not better than its start: no checkpoint of the run had a better held-out score and enough diversity, so "
        "these are the weights that it began with.**\n\n"
    )


def _beginning(config: RatsConfig) -> str:
    if not config.student.init:
        return ""
    path = Path(config.student.init)
    return f"It began as `{path.name if path.exists() else path}`, whose terms hold for it too. "


def _guidance(student: Student) -> str:
    strength = student.baked.get("guidance_scale", 1.0)
    if student.family == "flux" and strength != 1.0:
        return f"Its network takes a guidance of {strength:g} as an input, as FLUX.1-dev's does: one call per step."
    return "It samples without guidance: one call per step."


def _further(row: Evaluation) -> str:
    return "".join(f", {SPREAD[name]} that on its features of the same pictures" for name in row.diversities)


def _experts(student: Student, config: RatsConfig, index: Mapping[str, Any]) -> str:
    """Which of two experts each step belongs to, and which were trained."""
    boundary = index.get("boundary_ratio")
    if boundary is None:
        return ""
    first = {
        nfe: sum(called_at([s], boundary) == NETWORKS[:1] for s in sigmas) for nfe, sigmas in student.sigmas.items()
    }
    shares = ", ".join(f"{high} of {nfe} steps" for nfe, high in first.items())
    said = f" The expert for high noise takes {shares} (sigmas from {boundary:g} on), that for low noise the others"
    if config.method != "consistency" and all(high == nfe for nfe, high in first.items()):
        return f"{said}: none, so it was not trained."
    return f"{said}; both were trained."


def _licence(teacher: Origin) -> str:
    """A student is derived from its teacher, so the teacher's licence applies."""
    if not teacher.license:
        return (
            f"No licence of `{teacher.name}` was found when this card was written: find out under which terms it may "
            "be used before you use or share this student."
        )
    name = teacher.license_name or teacher.license
    link = teacher.terms.name if teacher.terms else teacher.license_link
    return f"Licence: that of `{teacher.name}`, {f'[{name}]({link})' if link else name}."


def _columns(row: Evaluation, rewards: Rewards) -> dict[str, Sequence[float]]:
    """The per-prompt values of one row by column heading."""
    scores = {
        "scorer (trained on)": rewards[TRAINED].of_raw(row.scores),
        "held-out scorer": rewards[HELDOUT].of_raw(row.scores),
    }
    if REPORTED in rewards:
        scores["scorer that only reports"] = rewards[REPORTED].of_raw(row.scores)
    judged = {heading: row.judge[name] for name, heading in JUDGED.items() if name in row.judge}
    others = {SPREAD[name]: values for name, values in row.diversities.items()}
    return {**scores, **judged, DIVERSITY: row.diversity, **others}


def _table(table: Sequence[Evaluation], rewards: Rewards, prompts: Sequence[str]) -> str:
    headings = list(_columns(table[0], rewards))
    lines = ["| model | NFE | guidance | " + " | ".join(headings) + " |", "|---" * (3 + len(headings)) + "|"]
    for row in table:
        cells = [
            "{:.3f} ± {:.3f}".format(*mean_error(values, prompts[: len(values)]))
            for values in _columns(row, rewards).values()
        ]
        lines.append(f"| {row.label} | {row.nfe} | {row.guidance:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _differences(table: Sequence[Evaluation], rewards: Rewards, prompts: Sequence[str]) -> str:
    students, teacher = [row for row in table if row.label == "student"], _columns(table[0], rewards)
    headings = " | ".join(f"{row.nfe} steps" for row in students)
    lines = [f"| figure | {headings} |", "|---" * (1 + len(students)) + "|"]
    columns = [_columns(row, rewards) for row in students]
    for name, values in teacher.items():
        cells = ["{:+.3f} ± {:.3f}".format(*paired(column[name], values, prompts[: len(values)])) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
