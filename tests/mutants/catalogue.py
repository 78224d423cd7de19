"""The list of mutants: small faults, each with the tests that are to notice it.

``mutants.toml`` holds one table for each: ``name``, ``file``, ``old`` (text that stands in it once), ``new``
and ``tests`` (arguments of pytest). An entry that no longer fits the code is an error, never skipped.
"""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).parent / "mutants.toml"


class ListError(Exception):
    """Entries that do not fit the code; one sentence for each."""


@dataclass(frozen=True)
class Mutant:
    """One fault: in ``file``, ``old`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ListError: the text does not hold ``old`` exactly once, or the result is not Python.
        """
        if (count := text.count(self.old)) != 1:
            raise ListError(f"{self.name}: {self.file} holds the old text {count} times; once is needed")
        if self.old == self.new:
            raise ListError(f"{self.name}: the new text is the old one")
        changed = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            try:
                ast.parse(changed)
            except SyntaxError as error:
                raise ListError(f"{self.name}: line {error.lineno} would not be Python") from None
        return changed


def read_list(root: Path, file: Path = LIST) -> list[Mutant]:
    """All mutants, each tried on the files below ``root``.

    Raises:
        ListError: names every entry that does not fit.
    """
    mutants = [
        Mutant(**{**entry, "tests": tuple(entry["tests"])})
        for entry in tomllib.loads(file.read_text("utf-8"))["mutant"]
    ]
    wrong = [reason for mutant in mutants for reason in _misfits(root, mutant)]
    names = [mutant.name for mutant in mutants]
    wrong += [f"{name}: the name stands twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if wrong:
        raise ListError("\n".join(wrong))
    return mutants


def _misfits(root: Path, mutant: Mutant) -> list[str]:
    path = root / mutant.file
    if not path.is_file():
        return [f"{mutant.name}: there is no file {mutant.file}"]
    try:
        mutant.apply(path.read_text("utf-8"))
    except ListError as error:
        return [str(error)]
    if not mutant.tests:
        return [f"{mutant.name}: it names no test"]
    missing = [test for test in mutant.tests if not _exists(root, test)]
    return [f"{mutant.name}: there is no test {test}" for test in missing]


def _exists(root: Path, test: str) -> bool:
    """Whether the file is there, and defines the function (before its parameters) that is named in it."""
    file, _, function = test.partition("::")
    path = root / file
    if not function:
        return path.exists()
    return path.is_file() and f"def {function.partition('[')[0]}(" in path.read_text("utf-8")
