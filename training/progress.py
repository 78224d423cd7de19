"""The progress of a long run: a rich bar on the terminal, and JSON lines in a file."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from training.tracker import TensorBoard, Tracker

console = Console(stderr=True)


def quiet() -> None:
    """Silence libraries' messages that a user cannot act on; real warnings stay."""
    # fp32 norm weights under bf16 autocast are what we want; torch only says that it runs its unfused form.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    # FLUX's blocks return views and diffusers changes none in place: gradients equal those of a whole network (tested).
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


class StepLog:
    """Appends one JSON object per step to ``path``, and the same figures for TensorBoard in a folder beside it.

    A resumed run drops the lines that it will redo. TensorBoard counts finished steps: what is measured before the
    first one stands at 0. ``beside`` is one tracker more.
    """

    def __init__(self, path: Path, first_step: int, beside: Tracker | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if row["step"] < first_step] if first_step else []
        path.write_text("".join(map(_line, kept)))
        self._path = path
        self._trackers: list[Tracker] = [TensorBoard(path, first_step), *([beside] if beside else [])]
        self._start = time.monotonic()

    def write(self, step: int, **values: float) -> None:
        """Log one step; ``elapsed_s`` counts from when this process started or resumed the run."""
        row = {"step": step, **values, "elapsed_s": round(time.monotonic() - self._start, 2)}
        with self._path.open("a") as file:
            file.write(_line(row))
        for tracker in self._trackers:
            tracker.log(values, step + 1)

    def close(self) -> None:
        """Write what the trackers have not been given yet."""
        for tracker in self._trackers:
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


def steps(label: str, first: int, last: int, passing: bool = False, shown: bool = True) -> Iterator[int]:
    """Count from ``first`` to ``last - 1`` with a bar that shows the remaining time.

    A ``passing`` bar is erased at its end. Of several processes only one has it ``shown``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=passing, disable=not shown) as bar:
        task = bar.add_task(label, total=last, completed=first)
        for step in range(first, last):
            yield step
            bar.advance(task)
