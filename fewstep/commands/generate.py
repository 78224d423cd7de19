"""``fewstep generate``: images for a prompt, written to files."""

from __future__ import annotations

import math
import secrets
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep.answers import Answer
from fewstep.client import Client
from fewstep.errors import FewstepError, WrongUse
from fewstep.options import ApiKey, Json, Url, client, write_file
from fewstep.output import choice, milliseconds, plain, print_json, remarks, rewards
from fewstep.request import Options

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}
STANDARD_OUTPUT = Path("-")


class Format(StrEnum):
    """The formats that the service writes."""

    png = "png"
    jpeg = "jpeg"
    webp = "webp"
    mp4 = "mp4"


def generate(
    prompt: Annotated[str, typer.Argument(help="What the images should show.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write; several images get their seeds in the name."),
    ] = Path("out.png"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=10, help="Number of images.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The first image's seed.", show_default="random")] = None,
    steps: Annotated[int | None, typer.Option(help="One of the model's step counts.", show_default="its most")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, for models that take one.")] = None,
    best_of: Annotated[int, typer.Option(min=1, max=16, help="Candidates for each image; the best is kept.")] = 1,
    rank_by: Annotated[
        str | None, typer.Option(help="The scorer that chooses.", show_default="the trained one")
    ] = None,
    min_reward: Annotated[
        str | None, typer.Option(help="Try again for images below this: a score, or a percentile such as p20.")
    ] = None,
    cascade: Annotated[str | None, typer.Option(help="Step counts of the further tries, such as 2,4,8.")] = None,
    model: Annotated[str | None, typer.Option(help="The id of a served model.")] = None,
    model_version: Annotated[str | None, typer.Option(help="One of its versions, or latest.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.", show_default="the model's")] = None,
    fps: Annotated[int | None, typer.Option(min=1, max=60, help="Frames per second of a video.")] = None,
    format: Annotated[Format | None, typer.Option(help="The file format.", show_default="by the file's name")] = None,
    quality: Annotated[int | None, typer.Option(min=0, max=100, help="Quality of jpeg, webp and mp4.")] = None,
    priority: Annotated[int | None, typer.Option(min=-5, max=5, help="Higher goes first.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Deadline in seconds.")] = None,
    webhook: Annotated[str | None, typer.Option(help="An https address to notify when the job has ended.")] = None,
    allow_training: Annotated[
        bool | None,
        typer.Option("--allow-training/--no-training", help="Whether the prompt may train.", show_default="by the key"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and do not wait.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Generate images for a prompt and write them to files; `-o -` writes a single image to standard output."""
    options: dict[str, Any] = {
        "n": count, "seed": seed, "num_inference_steps": steps, "model": model, "model_version": model_version,
        "size": size, "num_frames": frames, "fps": fps, "output_format": _format(output, format),
        "output_compression": quality, "priority": priority, "timeout_s": timeout, "guidance_scale": guidance,
        "webhook_url": webhook, "rank_by": rank_by, "best_of": best_of if best_of > 1 else None,
        "min_reward": _floor(min_reward), "cascade": _steps(cascade),
        "allow_training": allow_training,
    }  # fmt: skip
    with client(url, api_key) as service:
        if detach:
            job = service.submit(prompt, **cast(Options, options))
            return print_json(job) if json else typer.echo(job.id)
        _check(output, count)
        _save(_generated(service, prompt, cast(Options, options)), output, json)


def _floor(text: str | None) -> float | str | None:
    """A score is a number; a percentile is left to the service to read."""
    try:
        score = None if text is None else float(text)
    except ValueError:
        return text
    return text if score is not None and not math.isfinite(score) else score


def _steps(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise WrongUse(f"--cascade is {text!r}: accepted are step counts separated by commas, such as 2,4,8.") from None


def _generated(service: Client, prompt: str, options: Options) -> Answer:
    """The answer; Ctrl-C cancels the job, which the service would otherwise keep for a client that reconnects."""
    key = secrets.token_hex(16)
    try:
        return service.generate(prompt, idempotency_key=key, **options)
    except KeyboardInterrupt:
        with suppress(FewstepError):
            job = service.cancel(service.submit(prompt, idempotency_key=key, **options).id)
            typer.echo(f"fewstep: Interrupted; job {job.id} was cancelled.", err=True)
        raise


def _format(output: Path, format: Format | None) -> str:
    """The option's value, else the file name's, else png."""
    if format is not None:
        return format.value
    if output == STANDARD_OUTPUT:
        return "png"
    if output.suffix.lower() not in FORMATS:
        raise WrongUse(f"{output} does not name an image format: use --format, or end it in .png, .jpg, .webp or .mp4.")
    return FORMATS[output.suffix.lower()]


def _check(output: Path, count: int) -> None:
    """Whether the images can be written at all, before any is generated."""
    if output == STANDARD_OUTPUT:
        if count > 1:
            raise WrongUse("Standard output takes one image: leave out -n, or name a file.")
    elif not output.parent.is_dir():
        raise WrongUse(f"{output} cannot be written: there is no directory {output.parent}.")


def _save(answer: Answer, output: Path, json: bool) -> None:
    if output == STANDARD_OUTPUT:
        sys.stdout.buffer.write(answer.data[0].data)
        return
    files = [write_file(_file(output, picture.seed, len(answer.data)), picture.data) for picture in answer.data]
    if json:
        whole = plain(answer)
        return print_json({**whole, "data": [{"file": str(f), **d} for f, d in zip(files, whole["data"], strict=True)]})
    for picture, file in zip(answer.data, files, strict=True):
        typer.echo(f"{file}  seed {picture.seed}  {rewards(picture.reward)}{choice(picture)}")
    steps = f"{answer.model} {answer.model_version}, batch of {answer.batch_size}"
    typer.echo(f"{milliseconds(answer.timings.total_s)} in all, {steps}", err=True)
    for line in remarks(answer):
        typer.echo(line, err=True)


def _file(output: Path, seed: int, count: int) -> Path:
    return output if count == 1 else output.with_stem(f"{output.stem}-{seed}")
