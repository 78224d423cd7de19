"""The results that are published beside the report, in one compressed file, and taken over by later processes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from student.writing import write_atomically
from training.config import to_json
from training.lab import stops
from training.lab.cells import Cell
from training.lab.run import RESULT, Result, alone
from training.lab.stops import Figures
from training.rundir import CONFIG, claim, settings_in

FILE = "runs.jsonl.gz"
DIGITS = 6  # of what a scorer says; a share of right pictures has fewer
Teachers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Published:
    """What a report was written from; ``settings`` has each run's configuration, by its key."""

    prompts: list[str]
    references: dict[str, Figures]
    teachers: Teachers
    results: list[Result]
    settings: dict[str, dict[str, Any]]

    def result_of(self, cell: Cell) -> Result | None:
        """A cell's result, where it was run with the configuration that the cell has."""
        if cell.key not in self.settings:
            return None
        before, now = (
            settings_in(json.dumps(one), cell.config)
            for one in (self.settings[cell.key], settings_of(to_json(cell.config)))
        )
        if before != now:
            return None
        return next(one for one in self.results if one.key == cell.key)


def settings_of(config: str) -> dict[str, Any]:
    """A run's configuration from its JSON, with its teacher's name for the folder that holds it."""
    settings: dict[str, Any] = json.loads(config)
    return {**settings, "model": Path(settings["model"]).name}


def write(published: Published, folder: Path) -> None:
    """``folder/runs.jsonl.gz``: what all runs share in the first line, then one run in each, by key."""
    references = {name: asdict(figures) for name, figures in published.references.items()}
    shared = {"prompts": published.prompts, "references": references, "teachers": published.teachers}
    runs = [
        {"settings": published.settings[one.key], "result": asdict(one)}
        for one in sorted(published.results, key=lambda one: one.key)
    ]
    lines = "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in (shared, *runs))
    write_atomically(folder / FILE, gzip.compress(lines.encode(), mtime=0))


def read(folder: Path) -> Published:
    """What ``write`` wrote; without a file, what there is before the first run."""
    if not (folder / FILE).exists():
        return Published([], {}, {}, [], {})
    lines = _lines(folder / FILE)
    shared, runs = next(lines), list(lines)
    results = [Result(**{**row["result"], "stops": list(map(stops.of_row, row["result"]["stops"]))}) for row in runs]
    return Published(
        shared["prompts"],
        {name: Figures(**row) for name, row in shared["references"].items()},
        shared["teachers"],
        results,
        {row["result"]["key"]: row["settings"] for row in runs},
    )


def take_over(published: Published, plan: Sequence[Cell], out: Path) -> int:
    """Put the results of ``plan`` into ``out`` that it lacks; returns how many those are."""
    taken = 0
    for cell in plan:
        found, place = published.result_of(cell), out / cell.key
        if found is None or place.exists():
            continue
        with alone(place) as mine:
            if mine:
                claim(place, cell.config)
                write_atomically(place / RESULT, json.dumps(asdict(found)).encode())
                taken += 1
    return taken


def settings_of_all(out: Path, results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """The configurations of results, from their folders."""
    return {one.key: settings_of((out / one.key / CONFIG).read_text()) for one in results}


def difference(ours: Result, theirs: Result) -> dict[str, tuple[float, float, float]]:
    """For each figure the mean of both over the stopping times that both reached, and the largest difference at any
    prompt. Empty: they reached none.
    """
    reached = {(stop.step, stop.nfe): stop.figures for stop in theirs.stops}
    both = [(stop.figures, reached[key]) for stop in ours.stops if (key := (stop.step, stop.nfe)) in reached]
    found = {}
    for name in asdict(both[0][0]) if both else ():
        a_SP, b_SP = (np.array([getattr(pair[side], name) for pair in both]) for side in (0, 1))
        found[name] = (float(a_SP.mean()), float(b_SP.mean()), float(np.abs(a_SP - b_SP).max()))
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in gzip.decompress(path.read_bytes()).splitlines():
        yield json.loads(line)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else value
