"""Trains the cells one after the other; several processes may share the folder, and each can be interrupted."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from student.files import hash_weights
from student.writing import write_atomically
from training.config import changed
from training.experiment.setup import Setup, prepare
from training.experiment.validation import trainer
from training.lab import references, stops, teachers
from training.lab.cells import Cell
from training.lab.gates import RecordedGate
from training.lab.stops import Stop
from training.lab.teachers import TeachersConfig
from training.progress import console
from training.rats.rats import Rats
from training.rats.trainer import CHECKPOINT, Trainer
from training.rundir import RunDiverged, claim
from training.sampler import Sampler

RESULT, STOPS, TEACHERS = "result.json", "stops", "teachers"


@dataclass(frozen=True)
class Result:
    """One finished cell: every stopping time of its run.

    ``seconds`` is what the process computed for it; ``weights`` is the sha256 of its teacher's network.
    """

    key: str
    teacher: str
    method: str
    strength: str
    part: str
    seed: int
    seconds: float
    stops: list[Stop]
    weights: str = ""


def make_teachers(folder: Path, config: TeachersConfig) -> dict[str, dict[str, float]]:
    """Both teachers and their figures; a second process waits for the first."""
    with alone(folder / TEACHERS, wait=True):
        return teachers.make(folder / TEACHERS, config)


def run_all(cells: Sequence[Cell], folder: Path, steps: int = 0) -> int:
    """Run every cell that has no result yet and that no other process is running; returns how many are left to these.

    ``steps`` are those of a trial, whose references are as short.
    """
    with alone(folder / "references", wait=True):
        references.measure(folder / references.FILE, references.configs(folder / TEACHERS, steps))
    left = 0
    for i, cell in enumerate(cells, 1):
        place = folder / cell.key
        with alone(place) as mine:
            if not (place / RESULT).exists() and mine:
                console.print(
                    f"[bold]{cell.key}[/bold] ({i} of {len(cells)}, about {cell.expected_s / 60:.0f} minutes)"
                )
                _run(cell, prepare(cell.config), place)
            left += not (place / RESULT).exists()
    return left


@contextmanager
def alone(place: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has ``place`` to itself for as long as the block lasts; a dead process holds nothing."""
    lock = place.with_name(f"{place.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                yield False
                return
            console.print(f"another process is at work on {place}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def check(cell: Cell, folder: Path) -> list[Stop]:
    """A run whose stopping times are judged on the validation prompts, so that the evaluation prompts stay unseen."""
    return again(cell, folder / "check", on_validation=True).stops


def again(cell: Cell, folder: Path, on_validation: bool = False) -> Result:
    """A cell's result in a folder beside the experiment's, where it is made if it isn't there."""
    place = folder / cell.key
    with alone(place, wait=True):
        if not (place / RESULT).exists():
            setup = prepare(cell.config)
            judged = setup.prompts.validation if on_validation else setup.prompts.test
            _run(cell, replace(setup, prompts=replace(setup.prompts, test=judged)), place)
    return _read(place / RESULT)


def _run(cell: Cell, setup: Setup, place: Path) -> None:
    begun = time.process_time()
    claim(place, cell.config)
    training = watched(setup, place)
    try:
        training.run()
    except RunDiverged as error:
        console.print(f"[yellow]{cell.key}: {error}; its stopping times until then count[/yellow]", highlight=False)
    found = stops.read(place / STOPS)
    seconds = time.process_time() - begun
    weights = hash_weights(Path(cell.config.model) / "transformer")
    seed = cell.config.seed
    _keep(place, Result(cell.key, cell.teacher, cell.method, cell.strength, cell.part, seed, seconds, found, weights))
    (place / CHECKPOINT).unlink(missing_ok=True)
    for name in (STOPS, "grids", "tensorboard"):
        shutil.rmtree(place / name, ignore_errors=True)


def watched(setup: Setup, place: Path) -> Trainer:
    """The run's trainer, every validation of which is also written down as a stopping time."""
    training = trainer(setup, place)
    assert isinstance(training.method, Rats)
    gate = training.method.gate = RecordedGate(setup.config)
    own = training.validate

    def validate(samplers: Sequence[Sampler], step: int) -> dict[str, float]:
        row, noted = own(samplers, step), gate.taken()
        found = []
        for sampler in samplers:
            with setup.roles.rollouts():
                figures = stops.drawn(setup, sampler)
            found.append(Stop(step, len(sampler.sigmas), row["heldout_validation"], figures, noted))
        stops.write(found, place / STOPS / f"{step:06d}.json")
        return row

    training.validate = validate
    return training


def _keep(place: Path, result: Result) -> None:
    write_atomically(place / RESULT, json.dumps(asdict(result)).encode())


def results(folder: Path) -> list[Result]:
    """All results there are, in the order of their keys."""
    return [_read(path) for path in sorted(folder.glob(f"*/{RESULT}"))]


def complete(found: Sequence[Result], plan: Sequence[Cell]) -> list[Result]:
    """Without the seeds whose sweep is not whole, which alone makes an area smaller; all, where a method has none."""
    keys = {one.key for one in found}
    short = {(cell.teacher, cell.method, cell.config.seed) for cell in plan if cell.key not in keys}
    whole = {(one.teacher, one.method) for one in found if (one.teacher, one.method, one.seed) not in short}
    return [
        one
        for one in found
        if (one.teacher, one.method, one.seed) not in short or (one.teacher, one.method) not in whole
    ]


def _read(path: Path) -> Result:
    row = json.loads(path.read_text())
    return Result(**{**row, "stops": [stops.of_row(stop) for stop in row["stops"]]})


def only(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells whose key contains one of ``names``; all of them without names."""
    return [cell for cell in cells if not names or any(name in cell.key for name in names)]


def shortened(cell: Cell, steps: int) -> Cell:
    """The same cell with few steps, for a trial."""
    values = {"steps": steps, "validation.every": max(1, steps // 2), "teacher.guided_steps": steps // 2}
    return replace(cell, config=changed(cell.config, values))
