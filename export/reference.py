"""``python -m export.reference BUNDLE --prompts FILE``: measure the distribution that served scores are compared with.

A training run measures its student on its test prompts. If you serve other prompts, or have more of them, measure the
student on those: each once, at every step count. The more there are, the smaller a drift can be detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from student.bundle import BundleError, RewardReference, Student, read_student, rewrite_student
from student.reference import at_key, distribution, with_distribution
from student.runtimes.runtime import Runtime
from student.runtimes.sizes import own_size

FIRST_SEED = 3_000_000  # none of those with which anything else is measured
FEWEST = 20  # pictures with a score, of each step count: below, there is no 5th percentile


def measured(runtime: Runtime, prompts: Sequence[str]) -> dict[str, RewardReference]:
    """The distribution of each scorer's standardised scores, with one picture per prompt, at each step count.

    Raises:
        BundleError: too few pictures have a score.
    """
    student, found = runtime.student, dict[str, RewardReference]()
    for steps in student.steps:
        for name, scores in _scores(runtime, prompts, steps).items():
            if len(scores) < FEWEST:
                raise BundleError(
                    f"{name} scored {len(scores)} pictures of {steps} steps: accepted are {FEWEST} or more"
                )
            key = at_key(student, steps, own_size(student))
            found[name] = with_distribution(found.get(name), key, distribution(scores))
    return found


def _scores(runtime: Runtime, prompts: Sequence[str], steps: int) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    starts = range(0, len(prompts), runtime.max_batch)
    for first in track(starts, f"pictures of {steps} steps"):
        texts = list(prompts[first : first + runtime.max_batch])
        seeds = list(range(FIRST_SEED + first, FIRST_SEED + first + len(texts)))
        for name, score_B in runtime.score(runtime.draw(texts, seeds, steps), texts).items():
            scores.setdefault(name, []).extend(float(score) for score in score_B if np.isfinite(score))
    return scores


def measure_reference(bundle: Path, runtime: Runtime, prompts: Sequence[str]) -> Student:
    """Measure, and write the result into the bundle's manifest; the results of other scorers stay."""
    found = measured(runtime, prompts)
    student = read_student(bundle)
    student = replace(student, reward_reference={**student.reward_reference, **found})
    rewrite_student(bundle, student)
    return student


def reference(
    bundle: Annotated[Path, typer.Argument(help="Folder of the student bundle.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, one per line; each is used once at every step count.")],
    runtime: Annotated[str, typer.Option(help="The runtime to use: see FEWSTEP_RUNTIME.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
) -> None:
    """Measure the scores of the student's pictures for these prompts; percentiles, floors and drift refer to them."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        from export.measure import read_prompt_file
        from rewards.serving import open_reward
        from student.runtimes.load import load
        from student.runtimes.options import Options

        opened = load(bundle, runtime, threads, Options(open_reward))
        student = measure_reference(bundle, opened, tuple(dict.fromkeys(read_prompt_file(prompts))))
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"reference: {error}", err=True)
        raise typer.Exit(1) from None
    for name, found in student.reward_reference.items():
        for key, row in (found.at or {}).items():
            typer.echo(f"{name} at {key} steps: {row.mean:.3f} ± {row.std:.3f}, {row.count} prompts")


if __name__ == "__main__":
    typer.run(reference)
