"""The student's model card: what it is, what was measured, how it was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from student.bundle import Student
from training.evaluate import Evaluation, mean_error, paired
from training.instruments import HELDOUT, TRAINED, Scale
from training.rats.preset import RatsConfig

JUDGED = {"right": "fully right", "right_but_shape": "right but shape", "color": "colour", "shape": "shape"}


def card(student: Student, config: RatsConfig, table: Sequence[Evaluation], scale: Scale) -> str:
    """The card's Markdown, in the hub's form."""
    num = len(scale.standardised(table[0], TRAINED))
    note = f"**A short run: {config.steps} steps, evaluated on {num} prompts only.**\n\n" if num < 512 else ""
    return "\n".join(
        [
            _front_matter(student),
            f"# {student.id}: a {' or '.join(map(str, config.nfe))}-step student trained with RATS\n",
            f"{note}Student of `{student.teacher}`, trained by fewstep with reward-aware trajectory shaping "
            "(RATS, arXiv 2604.14910). It draws without guidance.\n",
            "![teacher and student on the same prompts and seeds](grid.png)\n",
            "## Evidence\n",
            f"{num} held-out test prompts, prompt i with seed i; mean ± standard error. Scores are in standard "
            "deviations of the teacher above the teacher's mean on calibration prompts. The checkpoint was chosen by "
            "the held-out scorer on validation prompts; the exact judge had no part in that. Diversity is the "
            f"Vendi score of 8 seeds ({len(table[0].diversity)} prompts) on autoencoder latents.\n",
            _table(table, scale),
            "## Paired differences, student minus teacher at its full step count\n",
            _differences(table, scale),
            "## Use\n",
            _usage(student),
            "## Training\n",
            "![curves](curves.png)\n",
            f"```json\n{json.dumps(asdict(config), indent=2)}\n```\n",
        ]
    )


def _front_matter(student: Student) -> str:
    return (
        "---\nlicense: apache-2.0\nlibrary_name: diffusers\npipeline_tag: text-to-image\n"
        f"base_model: {student.teacher}\ntags: [few-step, rats, fewstep]\n---\n"
    )


def _columns(row: Evaluation, scale: Scale) -> dict[str, Sequence[float]]:
    """Every figure of one row by its heading, prompt by prompt."""
    scores = {
        "scorer (trained on)": scale.standardised(row, TRAINED),
        "held-out scorer": scale.standardised(row, HELDOUT),
    }
    judged = {heading: row.judge[name] for name, heading in JUDGED.items() if name in row.judge}
    return {**scores, **judged, "diversity": row.diversity}


def _table(table: Sequence[Evaluation], scale: Scale) -> str:
    headings = list(_columns(table[0], scale))
    lines = ["| model | NFE | guidance | " + " | ".join(headings) + " |", "|---" * (3 + len(headings)) + "|"]
    for row in table:
        cells = ["{:.3f} ± {:.3f}".format(*mean_error(values)) for values in _columns(row, scale).values()]
        lines.append(f"| {row.label} | {row.nfe} | {row.guidance:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _differences(table: Sequence[Evaluation], scale: Scale) -> str:
    students, teacher = [row for row in table if row.label == "student"], _columns(table[0], scale)
    headings = " | ".join(f"{row.nfe} steps" for row in students)
    lines = [f"| figure | {headings} |", "|---" * (1 + len(students)) + "|"]
    columns = [_columns(row, scale) for row in students]
    for name, values in teacher.items():
        cells = ["{:+.3f} ± {:.3f}".format(*paired(column[name], values)) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _usage(student: Student) -> str:
    steps = student.steps[0]
    return f"""Served by fewstep: `POST /generate` with `{{"prompt": "a red heart above a blue star", "seed": 7}}`.
With diffusers, the served image of a seed is reproduced by:

```python
from pathlib import Path
from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce

path = Path("models/{student.id}")
images_BCHW = reproduce(open_pipeline(path), read_student(path), ["a red heart above a blue star"], [7], {steps})
```

or in plain diffusers: `DiffusionPipeline.from_pretrained(path)(prompt, num_inference_steps={steps},
sigmas={list(student.sigmas[steps])}, height={student.image.height}, width={student.image.width},
max_sequence_length={student.max_tokens})`.
"""
