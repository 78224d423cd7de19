"""``python -m export.score BUNDLE --reward pickscore --prompts FILE``: add scorers to a student that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError


def score(
    bundle: Annotated[Path, typer.Argument(help="Folder of the student bundle.")],
    reward: Annotated[
        list[str],
        typer.Option(help="pickscore, hpsv2.1, imagereward, clip, aesthetic or module:Class; commas, or again."),
    ],
    prompts: Annotated[Path, typer.Option(help="Prompts that its pictures are drawn of, one a line.")],
    images: Annotated[int, typer.Option(help="Pictures of each step count and size; else 64, or one a prompt.")] = 0,
    runtime: Annotated[str, typer.Option(help="What draws them: see FEWSTEP_RUNTIME.")] = "auto",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what the student's own pictures score, and serve that score with each picture from then on."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        from export.measure import Measurement, add_scorers, check_images, read_prompt_file

        lines = read_prompt_file(prompts)
        names = tuple(dict.fromkeys(part.strip() for row in reward for part in row.split(",") if part.strip()))
        asked = Measurement(names, lines, check_images(images or max(64, len(lines))), runtime, threads, typer.echo)
        student = add_scorers(bundle, asked)
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"score: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("score: interrupted; scores are kept, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    for name in student.scorers:
        known = student.reward_reference.get(name)
        typer.echo(f"{name}: {student.scorers[name].mean:.4g} ± {student.scorers[name].std:.3g}" if known else name)


if __name__ == "__main__":
    typer.run(score)
