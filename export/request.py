"""The user's request for an export, for any target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import ExportError
from export.verify import MORE_PROMPTS, PROMPTS
from student.bundle import Student
from student.runtimes.buckets import Bucket
from student.runtimes.lengths import LONGEST
from student.runtimes.sizes import Size, own_size, read_size

CALIBRATION = "calibration.txt"
Say = Callable[[str], None]


@dataclass(frozen=True)
class EngineOptions:
    """How to build a TensorRT engine; ``memory_bytes`` is the most that the building process may use.

    ``batches``: the last batch size of each optimisation profile. ``portable``: runs on other GPUs too, more slowly.
    ``batch_invariant``: an image does not depend on the rest of its batch, at some cost.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    memory_bytes: int = 64 * 2**30
    workspace_bytes: int = 4 * 2**30
    level: int = 3
    portable: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True)
class Request:
    """One student, one form, one precision; ``scorers`` are the folders in which to look for scorers.

    ``sizes`` and ``frames`` (numbers of frames, at every size) are those beside the student's own.
    """

    bundle: Path
    student: Student
    form: str
    precision: str
    scorers: tuple[Path, ...] = ()
    threads: int = 1
    force: bool = False
    prompts: tuple[str, ...] = PROMPTS
    sizes: tuple[Size, ...] = ()
    frames: tuple[int, ...] = ()
    engine: EngineOptions = field(default_factory=EngineOptions)
    say: Say = print

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every size in every length, but for the student's own size in its own length."""
        sizes = (own_size(self.student), *self.sizes)
        return tuple(Bucket(size, count) for size in sizes for count in (None, *self.frames))[1:]


def read_sizes(student: Student, names: Sequence[str], form: str) -> tuple[Size, ...]:
    """The sizes of ``--size``, without the student's own, which is always included.

    Raises:
        ExportError: one is invalid, or the form has one size only.
    """
    try:
        sizes = tuple(dict.fromkeys(map(read_size, names)))
    except ValueError as error:
        raise ExportError(f"{error}") from error
    others = tuple(size for size in sizes if size != own_size(student))
    if others and form != "staged":
        raise ExportError(f"the {form} form has only the student's own size: use --size with --form staged")
    return others


def read_frames(student: Student, text: str, form: str) -> tuple[int, ...]:
    """The numbers of frames of ``--frames``, without the student's own, which is always included.

    Raises:
        ExportError: one is invalid, the student generates images, or the form has one length only.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdigit() and 1 <= int(part) <= LONGEST for part in parts):
        raise ExportError(f"frames is {text!r}: accepted are numbers from 1 to {LONGEST}, separated by commas")
    if parts and student.image.frames is None:
        raise ExportError(f"{student.id} generates images, not videos: leave --frames out")
    others = tuple(dict.fromkeys(int(part) for part in parts if int(part) != student.image.frames))
    if others and form != "staged":
        raise ExportError(f"the {form} form has only the student's own length: use --frames with --form staged")
    return others


def read_prompts(bundle: Path, file: Path | None, precision: str) -> tuple[str, ...]:
    """The prompts of the proof: those of ``file``, of the bundle's ``calibration.txt``, or the starter world's.

    Raises:
        ExportError: the file does not exist, or has fewer than two lines.
    """
    wanted = file or bundle / CALIBRATION
    if not wanted.is_file():
        if file is not None:
            raise ExportError(f"{file} does not exist: accepted is a file of prompts, one per line")
        return PROMPTS if precision == "fp32" else MORE_PROMPTS
    lines = tuple(line for line in wanted.read_text("utf-8").splitlines() if line.strip())
    if len(lines) < 2:
        raise ExportError(f"{wanted} has {len(lines)} prompts: accepted are two or more, one per line")
    return lines
