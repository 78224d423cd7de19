"""Trains the comparison's cells one after the other; results are kept, so that it can be interrupted at any time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from training.config import changed, to_json
from training.evaluate import Evaluation
from training.experiment.setup import Setup, prepare
from training.experiment.validation import measured_on_test, trainer
from training.lab.cells import NFES, Cell, base
from training.progress import console
from training.rundir import claim
from training.sampler import Sampler

RESULT, TEACHER = "result.json", "teacher"


@dataclass(frozen=True)
class Result:
    """The result of one cell: the student's figures on the test prompts, by prompt.

    ``trained`` and ``heldout`` are standardised scores; ``distance`` is the mean squared difference of a picture to the
    teacher's at its full step count from the same noise.
    """

    key: str
    method: str
    part: str
    nfe: int
    seed: int
    trained: list[float]
    heldout: list[float]
    judge: dict[str, list[float]]
    diversity: list[float]
    distance: list[float]


def run_all(cells: list[Cell], folder: Path) -> None:
    """Run every cell that has no result yet."""
    reference = teacher_results(folder)
    for i, cell in enumerate(cells, 1):
        if (folder / cell.key / RESULT).exists():
            continue
        console.print(f"[bold]{cell.key}[/bold] ({i} of {len(cells)}, about {cell.expected_s / 60:.0f} minutes)")
        _run(cell, folder / cell.key, reference)


def _run(cell: Cell, folder: Path, reference: Tensor) -> None:
    setup = prepare(cell.config)
    claim(folder, to_json(cell.config))
    trainer(setup, folder).run()
    sampler = setup.sampler(setup.model, "student", cell.nfe)
    row = measured_on_test(setup, sampler, "student")
    images = _drawn(setup, sampler)
    _keep(folder, _result(cell.key, cell.method, cell.part, cell.config.seed, setup, row, images, reference))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def teacher_results(folder: Path) -> Tensor:
    """Measure the teacher at its full step count and at each of NFES (once); returns its full-count pictures."""
    kept = folder / f"{TEACHER}.pt"
    setup: Setup | None = None
    if not kept.exists():
        setup = prepare(base())
        sampler = setup.sampler(setup.model, "teacher", base().teacher.reference_nfe)
        images = _drawn(setup, sampler)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((images * 255).round().byte(), kept)
    reference = torch.load(kept, weights_only=True).float() / 255
    for nfe in (base().teacher.reference_nfe, *NFES):
        place = folder / f"{TEACHER}-nfe{nfe}"
        if (place / RESULT).exists():
            continue
        setup = setup or prepare(base())
        sampler = setup.sampler(setup.model, "teacher", nfe)
        row = measured_on_test(setup, sampler, "teacher")
        images = _drawn(setup, sampler)
        _keep(place, _result(place.name, "teacher", "teacher", 0, setup, row, images, reference))
    return reference


def _drawn(setup: Setup, sampler: Sampler) -> Tensor:
    test = setup.prompts.test
    return sampler.draw(test, list(range(len(test))), setup.latents.shape, setup.config.validation.batch)


def _result(
    key: str, method: str, part: str, seed: int, setup: Setup, row: Evaluation, images: Tensor, reference: Tensor
) -> Result:
    distance = (images - reference).square().flatten(1).mean(1).tolist()
    trained, heldout = (setup.rewards[role].of_raw(row.scores) for role in ("trained", "heldout"))
    return Result(key, method, part, row.nfe, seed, trained, heldout, dict(row.judge), row.diversity, distance)


def _keep(folder: Path, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(asdict(result)))
    part.replace(folder / RESULT)


def results(folder: Path) -> list[Result]:
    """All results there are, in the order of their keys."""
    return [Result(**json.loads(path.read_text())) for path in sorted(folder.glob(f"*/{RESULT}"))]


def only(cells: list[Cell], names: list[str]) -> list[Cell]:
    """The cells whose key contains one of ``names``; all of them without names."""
    return [cell for cell in cells if not names or any(name in cell.key for name in names)]


def shortened(cell: Cell, steps: int) -> Cell:
    """The same cell with few steps, for a trial."""
    guided = min(steps, cell.config.teacher.guided_steps)
    config = changed(cell.config, {"steps": steps, "validation.every": steps, "teacher.guided_steps": guided})
    return replace(cell, config=config)
