"""What a runtime is compiled for beside the student's own size and length: buckets with graphs of their own.

A bucket has a step and a decoder; the text stage is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from student.bundle import BundleError, Student
from student.runtimes.lengths import at_length
from student.runtimes.manifest import (
    DECODER,
    RUNTIMES,
    STAGE_NAMES,
    STEP,
    STEP_2,
    TEXT,
    RuntimeManifest,
    read_manifest,
)
from student.runtimes.sizes import Size, at_size, own_size, read_size, size_name


class Bucket(NamedTuple):
    """A size and, for videos of another length than the student's own, their number of frames."""

    size: Size
    frames: int | None = None

    @property
    def name(self) -> str:
        """``320x256``, or ``320x256x33`` with 33 frames."""
        return size_name(self.size) + ("" if self.frames is None else f"x{self.frames}")


def read_bucket(name: str) -> Bucket:
    """The inverse of ``Bucket.name``.

    Raises:
        ValueError: not a bucket.
    """
    parts = name.split("x")
    if len(parts) != 3:
        return Bucket(read_size(name))
    if not parts[2].isdigit():
        raise ValueError(f"{name!r} is not a bucket: accepted is WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES")
    return Bucket(read_size("x".join(parts[:2])), int(parts[2]))


def stage_name(stage: str, bucket: Bucket | None) -> str:
    """A graph's name: ``step`` for the student's own size and length, ``step-320x256`` in a bucket; ``text`` is always
    ``text``."""
    return stage if bucket is None or stage == TEXT else f"{stage}-{bucket.name}"


def in_buckets(student: Student, manifest: RuntimeManifest) -> dict[Bucket, Student]:
    """The student in each of a runtime's buckets."""
    found = {}
    for name in manifest.buckets:
        compiled = [f"{stage}-{name}" for stage in (STEP, STEP_2, DECODER) if f"{stage}-{name}" in manifest.stages]
        if not compiled:
            raise BundleError(f"the runtime {manifest.name} has no graph for {name}: make it again with export.run")
        shape, bucket = manifest.stages[compiled[0]].inputs["latents"], read_bucket(name)
        cells = int(shape[-2]), int(shape[-1])
        at = at_size(student, bucket.size, cells, manifest.bucket_sigmas.get(name))
        found[bucket] = at if bucket.frames is None else at_length(at, bucket.frames, int(shape[-3]))
    return found


def files_of(folder: Path, manifest: RuntimeManifest, bucket: Bucket | None) -> Mapping[str, Path]:
    """The stages' files of a bucket; of the student's own size and length, if None."""
    names = {stage: stage_name(stage, bucket) for stage in STAGE_NAMES}
    return {stage: folder / manifest.stages[name].file for stage, name in names.items() if name in manifest.stages}


def sizes_of(bundle: Path, student: Student) -> tuple[Size, ...]:
    """The sizes that requests may have: the student's own, and those of the runtimes in its bundle."""
    found = [own_size(student)]
    for folder in sorted((bundle / RUNTIMES).glob("[!.]*")):
        with suppress(BundleError, ValueError):
            found += [read_bucket(name).size for name in read_manifest(folder).buckets]
    return tuple(dict.fromkeys(found))
