"""The rows of a measurement as JSON lines, so that an interrupted one resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student.writing import write_atomically


class Journal:
    """The rows at ``path`` that belong to ``about`` (what the measurement depends on); others are dropped.

    An incomplete last line is dropped too, so that the next one is not appended to it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        lines: list[Any] = []
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        self.rows: list[Any] = lines[1:] if lines and lines[0] == about else []
        self._path = path
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in (about, *self.rows)).encode())

    def add(self, row: object) -> None:
        """Append a row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
