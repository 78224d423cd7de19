"""The output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from pydantic import BaseModel

from fewstep.answers import Answer, Job, Picture
from fewstep.errors import FewstepError

HIDDEN = {"b64_json"}
PROMPT_CHARS = 48


def print_json(value: Any) -> None:
    """JSON in ASCII: on one line for a program, indented for a person."""
    typer.echo(json.dumps(plain(value), indent=2 if sys.stdout.isatty() else None))


def print_error(error: FewstepError, as_json: bool) -> None:
    """One sentence, or the API's error object."""
    typer.echo(json.dumps({"error": error.detail()}) if as_json else f"fewstep: {error}", err=True)


def plain(value: Any) -> Any:
    """The value as plain JSON types, without the bytes of images."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in HIDDEN}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their names."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def rewards(reward: dict[str, float]) -> str:
    """Standardised scores in one line."""
    return "  ".join(f"{name} {score:+.2f}" for name, score in reward.items())


def choice(picture: Picture) -> str:
    """How a picture was chosen, in a few words; empty if it was not."""
    if picture.candidates is None:
        return ""
    below = ", below the floor" if picture.below_floor else ""
    count = len(picture.candidates)
    drawn = f"best of {count}" if count > 1 else "the only candidate"
    return f"  ({picture.steps} steps, {drawn}{below})"


def remarks(answer: Answer) -> list[str]:
    """Remarks on an answer whose pictures were chosen."""
    floor, lines = answer.floor, []
    if floor is not None and floor.lowered:
        lines.append(f"Load lowered the floor from {floor.asked_score:+.2f} to {floor.score:+.2f}.")
    if answer.ended_by is not None:
        lines.append(f"Not every image below the floor was tried again: {answer.ended_by}.")
    return lines


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def shortened(text: str, chars: int = PROMPT_CHARS) -> str:
    """A text on one line of at most this many characters."""
    line = " ".join(text.split())
    return line if len(line) <= chars else f"{line[: chars - 1]}…"


def job_line(job: Job) -> str:
    """A job in one sentence."""
    if job.queue is not None:
        return f"{job.id} is queued; {job.queue.position} jobs are ahead of it."
    if job.error is not None:
        return f"{job.id} is {job.status}: {job.error.message}"
    if job.timings is not None:
        what = "image" if job.progress is None else "video"
        count = f"{len(job.data)} {what}{'s' if len(job.data) != 1 else ''}"
        return f"{job.id} is done: {count} in {milliseconds(job.timings.total_s)}."
    return f"{job.id} is {job.status}{' and is being cancelled' if job.cancelling else ''}."
