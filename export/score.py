"""``python -m export.score BUNDLE --prompts FILE --reward pickscore``: measure a student's scores, or add scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError


def score(
    bundle: Annotated[Path, typer.Argument(help="Folder of the student bundle.")],
    prompts: Annotated[Path, typer.Option(help="Prompts to measure on, one per line.")],
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Add pickscore, hpsv2.1, imagereward, clip, aesthetic or module:Class; comma-separated, repeatable."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(help="Pictures for each step count and size; by default 64, or one per prompt if more.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(min=0, help="Pictures per prompt for predicting the gain of best_of; 0 for none.")
    ] = 8,
    within: Annotated[int, typer.Option(min=2, help="Number of prompts for that prediction.")] = 16,
    runtime: Annotated[str, typer.Option(help="The runtime to use: see FEWSTEP_RUNTIME.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
) -> None:
    """Measure the scores of the student's own pictures. Added rewards get their distribution, and from then on each
    picture is served with their score; for all scorers, measure how pictures of one prompt vary, to predict best_of."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        from export.measure import Measurement, add_scorers, check_images, read_prompt_file
        from export.within import add_within_prompt
        from student.bundle import read_student

        lines = read_prompt_file(prompts)
        names = tuple(dict.fromkeys(part.strip() for row in reward or () for part in row.split(",") if part.strip()))
        student = read_student(bundle)
        if names:
            number = check_images(images or max(64, len(lines)))
            student = add_scorers(bundle, Measurement(names, lines, number, runtime, threads, typer.echo))
        if seeds:
            student = add_within_prompt(bundle, lines[:within], seeds, runtime, threads)
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"score: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("score: interrupted; scores are kept, and the same command resumes from there", err=True)
        raise typer.Exit(130) from None
    for name in student.scorers:
        known = student.reward_reference.get(name)
        typer.echo(f"{name}: {student.scorers[name].mean:.4g} ± {student.scorers[name].std:.3g}" if known else name)
    for key, found in (student.within_prompt or {}).items():
        spreads = ", ".join(f"{name} {spread:.2f}" for name, spread in found.spread.items())
        typer.echo(f"within a prompt at {key} steps: {spreads}")


if __name__ == "__main__":
    typer.run(score)
