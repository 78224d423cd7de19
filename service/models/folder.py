"""The directory of students: ``<id>/<version>/student.json``, in which id and version must be those of the folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from student.bundle import MANIFEST, BundleError, Student, read_student

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Name:
    """One version of one model."""

    id: str
    version: str

    def __str__(self) -> str:
        return f"{self.id}/{self.version}"

    @classmethod
    def of(cls, text: str) -> Name:
        """The inverse of ``str``."""
        id, _, version = text.partition("/")
        return cls(id, version)


class Folder:
    """A directory of students. It is read anew each time, as folders come and go while the service runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[Name]:
        """Every version of every model, by id, the newest version last."""
        found = [
            Name(manifest.parent.parent.name, manifest.parent.name) for manifest in self.path.glob(f"*/*/{MANIFEST}")
        ]
        return sorted(filter(_sound, found), key=lambda name: (name.id, age(name.version)))

    def newest(self) -> list[Name]:
        """The newest version of every model."""
        return list({name.id: name for name in self.names()}.values())

    def bundle(self, name: Name) -> Path:
        """The folder of a student, which need not exist."""
        return self.path / name.id / name.version

    def student(self, name: Name) -> Student:
        """The manifest of a version.

        Raises:
            BundleError: it is missing or invalid, or names another student.
        """
        if not _sound(name):
            raise BundleError(f"{name} is not a valid ID/VERSION")
        student = read_student(self.bundle(name))
        if (student.id, student.version) != (name.id, name.version):
            raise BundleError(f"the manifest in {name} names {student.id}/{student.version} instead")
        return student


def age(version: str) -> list[tuple[int, str]]:
    """A key that sorts versions as people do: 2 before 10."""
    parts = re.split(r"(\d+)", version)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _sound(name: Name) -> bool:
    return bool(NAME.fullmatch(name.id) and NAME.fullmatch(name.version))
