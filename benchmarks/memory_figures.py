"""What ``benchmarks.train_memory`` counted, as it is kept and shown: one row for each preset and form of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "training" / "experiment" / "memory_gb.json"
HELD, PARTS = ("weights", "learnt"), ("teacher", "student", "backward", "update", "validation")


@dataclass(frozen=True)
class Row:
    """GB of one process: what lies there through a step, and the most that was alive in each part of it.

    ``weights`` are those of frozen networks, ``learnt`` is all that belongs to what learns: its weights, their average,
    their gradients and the optimizer's state.
    """

    name: str
    preset: str
    settings: Mapping[str, Any]
    processes: int
    limit_gb: float | None
    held: Mapping[str, float]
    peak: Mapping[str, float]

    @property
    def most(self) -> float:
        """The whole peak."""
        return max(self.peak.values())


def read(path: Path = FIGURES) -> list[Row]:
    """The figures that are kept."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def keep(row: Row, names: Sequence[str], path: Path = FIGURES) -> None:
    """Put a row into the kept figures, in the order of ``names``."""
    rows = {one.name: one for one in (*read(path), row)}
    path.write_text(json.dumps([asdict(rows[name]) for name in names if name in rows], indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The table in docs/cost.md."""
    columns = [*HELD, *PARTS, "the most", "aim"]
    return "\n".join([f"| GB | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns), *map(line, rows)])


def line(row: Row) -> str:
    """One row of it."""
    cells = [*(row.held[name] for name in HELD), *(row.peak[name] for name in PARTS), row.most]
    limit = "" if row.limit_gb is None else f"{row.limit_gb:g}"
    return " | ".join([f"| {row.name}", *(f"{cell:.1f}" for cell in cells), f"{limit} |"])
