"""Sizes beside the student's own, with the names that requests use: WIDTHxHEIGHT in pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from student.bundle import Student
from student.runtimes.manifest import Sigmas

Size = tuple[int, int]  # height, width
NAME = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class SizeRange:
    """Sizes whose sides are multiples of ``multiple_px``, up to ``most_px`` (None: limited by memory)."""

    multiple_px: int
    most_px: int | None = None

    def __contains__(self, size: object) -> bool:
        if not isinstance(size, tuple):
            return False
        return all(
            side >= self.multiple_px and side % self.multiple_px == 0 and (self.most_px is None or side <= self.most_px)
            for side in size
        )

    def __str__(self) -> str:
        limit = "" if self.most_px is None else f" up to {self.most_px}"
        return f"sides that are multiples of {self.multiple_px} pixels{limit}"


def draws(runtime: object, student: Student, size: Size) -> bool:
    """Whether a runtime accepts this size: its student's own, one that it was compiled for, or one in its range."""
    sizes: Iterable[Size] = getattr(runtime, "sizes", (own_size(student),))
    return size in sizes or size in (getattr(runtime, "size_range", None) or ())


def size_name(size: Size) -> str:
    """The name of a size: ``(256, 320)`` is 320x256."""
    return f"{size[1]}x{size[0]}"


def read_size(name: str) -> Size:
    """The inverse of ``size_name``.

    Raises:
        ValueError: not a size.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"size is {name!r}: accepted is WIDTHxHEIGHT in pixels, for example 320x256")
    return int(found[2]), int(found[1])


def own_size(student: Student) -> Size:
    """The size that the student was trained for."""
    return student.image.height, student.image.width


def at_size(student: Student, size: Size, cells: Size, sigmas: Sigmas | None = None) -> Student:
    """The same student at another size, so that the same code runs and verifies it; ``sigmas`` are that size's own."""
    latents = replace(student.latents, height=cells[0], width=cells[1])
    image = replace(student.image, height=size[0], width=size[1])
    return replace(student, latents=latents, image=image, sigmas=sigmas or student.sigmas)


def refusal(id: str, sizes: Iterable[Size]) -> str:
    """One sentence on the sizes that a student accepts."""
    names = [size_name(size) for size in sizes]
    if len(names) == 1:
        return f"{id} generates {names[0]} pixels and no other size."
    return f"{id} generates {', '.join(names[:-1])} or {names[-1]} pixels and no other size."
