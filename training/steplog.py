"""The figures of a long run, step by step: JSON lines in a file, and the trackers beside it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from student.writing import write_atomically
from training.disk import unless_full
from training.tracker import TensorBoard, Tracker


class StepLog:
    """Appends one JSON object per step to ``path``, and the same figures for TensorBoard in a folder beside it.

    A resumed run drops the lines that it will redo. TensorBoard counts finished steps: what is measured before the
    first one stands at 0. ``beside`` is one tracker more.
    """

    def __init__(self, path: Path, first_step: int, beside: Tracker | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if row["step"] < first_step] if first_step else []
        write_atomically(path, "".join(map(_line, kept)).encode())
        self._path = path
        self._trackers: list[Tracker] = [TensorBoard(path, first_step), *([beside] if beside else [])]
        self._start = time.monotonic()

    def write(self, step: int, **values: float) -> None:
        """Log one step; ``elapsed_s`` counts from when this process started or resumed the run."""
        with unless_full("lines of its log", self._path):
            self._append(_line({"step": step, **values, "elapsed_s": round(time.monotonic() - self._start, 2)}))
        self._track(step, values)

    def amend(self, step: int, **values: float) -> None:
        """Add figures to the line of ``step``, the last one."""
        with unless_full("lines of its log", self._path):
            rows = read_log(self._path)
            last = rows.pop() if rows and rows[-1]["step"] == step else {"step": step}
            write_atomically(self._path, "".join(map(_line, [*rows, {**last, **values}])).encode())
        self._track(step, values)

    def rows(self) -> list[dict[str, float]]:
        """All that is logged so far."""
        return read_log(self._path)

    def _append(self, line: str) -> None:
        """Whole lines only: after half of one the later ones could not be read."""
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError:
            os.truncate(self._path, before)
            raise

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in list(self._trackers):
            kept = False
            with unless_full("a tracker", self._path.parent):
                tracker.log(values, step + 1)
                kept = True
            if not kept:  # TensorBoard's thread has ended
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Write what the trackers have not been given yet."""
        for tracker in self._trackers:
            with unless_full("a tracker", self._path.parent):
                tracker.close()


def _line(row: dict[str, float]) -> str:
    """A row as strict JSON, which has no word for what is not finite."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, float]]:
    """All rows of a JSON-lines log, with null as NaN; a last line that a crash cut short is dropped."""
    if not path.exists():
        return []
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines():
        try:
            rows.append({k: math.nan if v is None else v for k, v in json.loads(line).items()})
        except json.JSONDecodeError:
            break
    return rows
