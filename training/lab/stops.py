"""A stopping time of a run: what the student draws then for the evaluation prompts, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from student.writing import write_atomically
from training.evaluate import FloatArray, over_pictures, vendi
from training.experiment.setup import Setup
from training.sampler import Sampler
from training.scorers import HELDOUT, TRAINED, move

SEEDS_EACH, FIRST_SEED = 4, 3_000_000  # noise that neither a validation nor the test of a run uses
Measured = tuple[list[float], list[float], list[float], FloatArray]


@dataclass(frozen=True)
class Figures:
    """One value for each evaluation prompt, over SEEDS_EACH pictures of it.

    ``right`` is the share that the exact judge accepts, ``trained`` and ``heldout`` are the two scorers' mean
    probabilities that a picture is right, ``diversity`` is the Vendi score of the pictures (1 to SEEDS_EACH).
    """

    right: list[float]
    trained: list[float]
    heldout: list[float]
    diversity: list[float]


@dataclass(frozen=True)
class Stop:
    """The student of ``nfe`` steps after ``step`` training steps.

    ``selecting`` is the selecting scorer's mean on the validation prompts, over the run's step counts; ``gate`` has the
    mean weight and gap of each stratum since the stop before.
    """

    step: int
    nfe: int
    selecting: float
    figures: Figures
    gate: dict[str, dict[str, float]] = field(default_factory=dict)


def drawn(setup: Setup, sampler: Sampler) -> Figures:
    """The figures of what a sampler draws for the run's evaluation prompts (``setup.prompts.test``)."""
    move(setup.rewards, str(setup.model.device))
    texts = [text for text in setup.prompts.test for _ in range(SEEDS_EACH)]
    seeds = [FIRST_SEED + i for i in range(len(texts))]

    def measure(_: int, images: Tensor, prompts: Sequence[str]) -> Measured:
        return _measured(setup, images, prompts)

    return _figures(over_pictures(sampler, texts, seeds, setup.latents.shape, setup.config.validation.batch, measure))


@torch.no_grad()
def of_images(setup: Setup, images: Tensor) -> Figures:
    """The figures of given pictures, SEEDS_EACH after each other for each evaluation prompt."""
    move(setup.rewards, str(setup.model.device))
    texts = [text for text in setup.prompts.test for _ in range(SEEDS_EACH)]
    size = setup.config.validation.batch
    parts = [_measured(setup, images[at : at + size], texts[at : at + size]) for at in range(0, len(texts), size)]
    return _figures(parts)


def _measured(setup: Setup, images: Tensor, prompts: Sequence[str]) -> Measured:
    assert setup.measure.judge is not None
    right = setup.measure.judge(images, prompts)["right"]
    trained, heldout = (setup.measure.scorers[name](images, prompts).double().tolist() for name in (TRAINED, HELDOUT))
    return right, trained, heldout, setup.measure.features(images).flatten(1).double().numpy()


def _figures(parts: Sequence[Measured]) -> Figures:
    right, trained, heldout = (
        np.concatenate([part[i] for part in parts]).reshape(-1, SEEDS_EACH).mean(1).tolist() for i in range(3)
    )
    features_ND = np.concatenate([part[3] for part in parts])
    diversity = [vendi(group) for group in np.split(features_ND, len(features_ND) // SEEDS_EACH)]
    return Figures(right, trained, heldout, diversity)


def write(stops: Sequence[Stop], path: Path) -> None:
    """The stops of one step; whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(stop) for stop in stops]).encode())


def read(folder: Path) -> list[Stop]:
    """Every stop of a run, by step and step count."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    return [of_row(row) for row in rows]


def of_row(row: dict[str, object]) -> Stop:
    """A stop from what ``asdict`` made of it."""
    figures = row.pop("figures")
    assert isinstance(figures, dict)
    return Stop(figures=Figures(**figures), **row)  # type: ignore[arg-type]
