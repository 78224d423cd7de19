"""``python -m export.adopt MODEL --steps 4 --out students/NAME``: make a student from a published model, untrained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError, Student


def adopt(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a diffusers pipeline, or a .safetensors file.")],
    out: Annotated[Path, typer.Option(help="Folder for the student.")],
    config: Annotated[
        str, typer.Option(help="For a single file: folder or hub id of the pipeline that it is a checkpoint of.")
    ] = "",
    steps: Annotated[str, typer.Option(help="Step counts, separated by commas: 4 or 4,8.")] = "4",
    lora: Annotated[list[str] | None, typer.Option(help="PATH_OR_ID[:WEIGHT] to merge; repeatable.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; by default the model's own.")] = "",
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 1,
    guidance: Annotated[
        float | None, typer.Option(help="Embedded guidance (FLUX.1-dev); by default the model's own.")
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="Rewards to score each picture: see export.score.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to measure the rewards on, one per line.")] = None,
    images: Annotated[
        int, typer.Option(help="Number of pictures to measure; by default 64, or one per prompt if there are more.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(min=0, help="Pictures per prompt, to predict the gain of best_of; 0 measures none.")
    ] = 8,
    within: Annotated[
        int, typer.Option(min=2, help="Number of prompts for which --seeds pictures are generated.")
    ] = 16,
    id: Annotated[str, typer.Option(help="The model's name in requests; by default the folder's name.")] = "",
    version: Annotated[str, typer.Option(help="Its version.")] = "1",
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
) -> None:
    """Make a student from a published few-step model: linked weights, its own sigmas and guidance, measured rewards."""
    from export.errors import ExportError

    try:  # the heavy imports wait until the arguments are read
        from export.adoption import Adoption
        from export.adoption import adopt as make
        from export.lora import Lora
        from export.measure import check_rewards, read_prompt_file
        from export.single_file import find_model
        from student.runtimes.sizes import read_size

        counts = _counts(steps)
        names = tuple(dict.fromkeys(part.strip() for row in reward or [] for part in row.split(",") if part.strip()))
        if names and prompts is None:
            raise ExportError("--reward needs --prompts FILE, the prompts to measure its scores on")
        lines = read_prompt_file(prompts) if prompts else ()
        wanted = read_size(size) if size else None
        loras = tuple(Lora.parse(text) for text in lora or [])
        asked = Adoption(
            find_model(model, config), counts, out, loras, wanted, frames, guidance, id, version, typer.echo
        )
        if not out.exists():
            check_rewards(names)
        student = make(asked)
        if names:
            student = _measured(out, student, names, lines, images, lines[:within] if seeds else (), seeds, threads)
    except (BundleError, ExportError, OSError, ValueError) as error:
        typer.echo(f"adopt: {error}", err=True)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        typer.echo(f"adopt: {error.name} is not installed: pip install 'fewstep[export]'", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("adopt: interrupted; finished work is kept, and the same command resumes from there", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out}: {student.family}, {', '.join(map(str, student.steps))} steps; FEWSTEP_MODEL={out} serves it")


def _measured(
    out: Path, student: Student, names: Sequence[str], lines: Sequence[str], images: int, repeated: Sequence[str],
    seeds: int, threads: int,
) -> Student:  # fmt: skip
    """The student with the rewards that it lacks, and their spread over ``seeds`` pictures of each of ``repeated``."""
    from export.card import add_rewards_to_card
    from export.measure import Measurement, add_scorers, check_images
    from export.within import add_within_prompt

    missing = tuple(name for name in names if not any(one.reward == name for one in student.scorers.values()))
    if missing:
        number = check_images(images or max(64, len(lines)))
        student = add_scorers(out, Measurement(missing, tuple(lines), number, "auto", threads, typer.echo))
        add_rewards_to_card(out, student)
    if repeated and (missing or student.within_prompt is None):
        student = add_within_prompt(out, repeated, seeds, "auto", threads)
    return student


def _counts(text: str) -> tuple[int, ...]:
    from export.errors import ExportError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 100 for part in parts):
        raise ExportError(f"steps is {text!r}: accepted are numbers from 1 to 100, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


if __name__ == "__main__":
    typer.run(adopt)
