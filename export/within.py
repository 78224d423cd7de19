"""Measures how the scores of a student's own pictures vary within a prompt, and stores that in the bundle.

Every prompt's scores are stored as soon as they are known, so that an interrupted measurement resumes where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from export.errors import ExportError
from export.journal import Journal
from rewards.serving import open_reward
from student.bundle import Student, WithinPrompt, read_student, rewrite_student
from student.reference import at_key
from student.runtimes.load import load
from student.runtimes.options import Options
from student.runtimes.runtime import Runtime
from student.runtimes.sizes import own_size
from student.within_prompt import measure

KEPT = ".within-prompt.jsonl"
FIRST_SEED = 1_000_000  # none of those that the distributions are made of
Rows = dict[tuple[int, str], dict[str, list[float]]]


def add_within_prompt(bundle: Path, prompts: Sequence[str], seeds: int, runtime: str, threads: int) -> Student:
    """Measure ``seeds`` pictures of each prompt with all scorers, at each step count and the student's own size.

    Raises:
        ExportError, BundleError: no scorer runs here, or there are too few prompts or pictures.
    """
    if len(prompts) < 2 or seeds < 2:
        raise ExportError(f"{len(prompts)} prompts and {seeds} seeds: accepted are two or more of both")
    opened = load(bundle, runtime, threads, Options(open_reward))
    scorers = {name: [row.source_sha256, row.mean, row.std] for name, row in opened.student.scorers.items()}
    about = {"student": opened.student.fingerprint(), "scorers": scorers, "seeds": seeds}
    journal = Journal(bundle / KEPT, about)
    rows: Rows = {(steps, prompt): scores for steps, prompt, scores in journal.rows}
    cells = [(steps, prompt) for steps in sorted(opened.student.steps) for prompt in prompts]
    for cell in track([cell for cell in cells if cell not in rows], "pictures of one prompt"):
        rows[cell] = _scores(opened, *cell, seeds)
        journal.add([*cell, rows[cell]])
    found = {
        at_key(opened.student, steps, own_size(opened.student)): _measured(rows, steps, prompts)
        for steps in sorted(opened.student.steps)
    }
    student = replace(read_student(bundle), within_prompt=found)
    rewrite_student(bundle, student)
    (bundle / KEPT).unlink()
    return student


def _scores(runtime: Runtime, steps: int, prompt: str, seeds: int) -> dict[str, list[float]]:
    """Standardised scores of ``seeds`` pictures of one prompt, by scorer."""
    scores: dict[str, list[float]] = {}
    for first in range(0, seeds, runtime.max_batch):
        part = range(FIRST_SEED + first, FIRST_SEED + min(first + runtime.max_batch, seeds))
        texts = [prompt] * len(part)
        for name, score_B in runtime.score(runtime.draw(texts, list(part), steps), texts).items():
            scores.setdefault(name, []).extend(float(score) for score in score_B)
    if not scores:
        raise ExportError(f"{runtime.student.id} has no scorer that runs here: add one with --reward")
    return scores


def _measured(rows: Rows, steps: int, prompts: Sequence[str]) -> WithinPrompt:
    """Of the scorers that have scored half of the prompts whole: one that fails often costs no other its figures."""
    by = {name: [rows[steps, prompt][name] for prompt in prompts] for name in rows[steps, prompts[0]]}
    whole = {name: sum(all(map(math.isfinite, scores)) for scores in row) for name, row in by.items()}
    usable = {name: row for name, row in by.items() if 2 * whole[name] >= len(prompts)}
    try:
        return measure(usable or by)
    except ValueError as error:
        raise ExportError(f"too few pictures of {steps} steps have a score: {error}") from error
