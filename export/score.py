"""``python -m export.score BUNDLE --prompts FILE --reward pickscore``: measure a student's scores, or add scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError


def score(
    bundle: Annotated[Path, typer.Argument(help="Folder of the student bundle.")],
    prompts: Annotated[Path, typer.Option(help="Prompts that its pictures are drawn of, one a line.")],
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Add pickscore, hpsv2.1, imagereward, clip, aesthetic or module:Class; commas, or again."),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures of each step count and size; else 64, or one a prompt.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=0, help="Pictures of one prompt, by which the gain of best_of is predicted; 0: none.")
    ] = 8,
    within: Annotated[int, typer.Option(min=2, help="Prompts of which so many pictures are drawn.")] = 16,
    runtime: Annotated[str, typer.Option(help="What draws them: see FEWSTEP_RUNTIME.")] = "auto",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what the student's own pictures score: of rewards that are added, the distribution, and serve that score
    with each picture from then on; of all its scorers, how pictures of one prompt differ, which predicts best_of."""
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
        typer.echo("score: interrupted; scores are kept, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    for name in student.scorers:
        known = student.reward_reference.get(name)
        typer.echo(f"{name}: {student.scorers[name].mean:.4g} ± {student.scorers[name].std:.3g}" if known else name)
    for key, found in (student.within_prompt or {}).items():
        spreads = ", ".join(f"{name} {spread:.2f}" for name, spread in found.spread.items())
        typer.echo(f"within a prompt at {key} steps: {spreads}")


if __name__ == "__main__":
    typer.run(score)
