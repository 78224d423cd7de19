"""The golden probe of a bundle: fixed (prompt, seed, steps) and the pictures that they must give, to the last bit.

A picture is a function of its prompt, seed, steps and of the engine that generates it, and of nothing else. So a few
pictures that are generated again and again show whether the engine is unchanged: it is if their bits are.
``probe.json`` is written by ``export.probe``. Bits also depend on the kind of machine, so they are stored by kind; on a
new kind, scores may differ from those of the first machine by a tolerance.

Legend: B images, C = 3 colour channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from student.bundle import BundleError, Student
from student.runtimes.runtime import FloatArray, Runtime
from student.writing import write_atomically

FORMAT = 1
FILE = "probe.json"
PAIRS = 8  # pictures of a probe, spread evenly over the step counts; at least one for each
FIRST_SEED = 2604
SCORE_TOLERANCE = 0.05  # standard deviations of the teacher: kinds of machine differ by far less, broken ones by more
SAME_SCORE = 1e-3  # of the same bits on the same kind of machine

Scores = Mapping[str, tuple[float, ...]]


class Outcome(StrEnum):
    """The result of a probe."""

    SAME = "same"  # the same bits, the same scores
    RECORDED = "recorded"  # a new kind of machine: scores within tolerance, bits recorded from now on
    PIXELS_CHANGED = "pixels_changed"  # other bits than before on this kind of machine: the engine changed
    SCORES_CHANGED = "scores_changed"  # the same bits, or a new kind of machine, with other scores
    FAILED = "failed"  # the pictures could not be generated


@dataclass(frozen=True)
class Pair:
    """One picture of the probe."""

    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """The results of the pairs: sha256 of each picture's float32 values (CHW), and its scores by scorer."""

    sha256: tuple[str, ...]
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """``student`` is the fingerprint of the student that it belongs to, ``known`` the results of each runtime by kind
    of machine; the scores of a runtime's first kind are the reference for the others."""

    student: str
    pairs: tuple[Pair, ...]
    known: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)
    score_tolerance: float = SCORE_TOLERANCE
    format: int = FORMAT


def choose_pairs(student: Student, prompts: Sequence[str]) -> tuple[Pair, ...]:
    """The pairs of a new probe: each with its own prompt and seed, and the step counts in turn."""
    count = max(PAIRS, len(student.steps))
    steps = sorted(student.steps)
    return tuple(Pair(prompts[k % len(prompts)], FIRST_SEED + k, steps[k % len(steps)]) for k in range(count))


def draw_pair(runtime: Runtime, pair: Pair) -> FloatArray:
    """images_BCHW of one pair, generated alone: a probe does not test what a batch may change."""
    return runtime.draw([pair.prompt], [pair.seed], pair.steps)


def measure(runtime: Runtime, pairs: Sequence[Pair]) -> Measured:
    """Generate and score the pairs."""
    images = [draw_pair(runtime, pair) for pair in pairs]
    return measured(images, [runtime.score(image, [pair.prompt]) for image, pair in zip(images, pairs, strict=True)])


def measured(images: Sequence[FloatArray], scores: Sequence[Mapping[str, FloatArray]]) -> Measured:
    """The hashes and scores of generated pairs, each an images_BCHW with B = 1."""
    names = sorted(scores[0]) if scores else []
    table = {name: tuple(round(float(row[name][0]), 6) for row in scores) for name in names}  # may be no numbers
    return Measured(tuple(digest(image) for image in images), table)


def digest(images_BCHW: FloatArray) -> str:
    """sha256 of the float32 values as they leave the network: rounding to bytes would hide small changes."""
    plain = np.ascontiguousarray(images_BCHW[0], dtype="<f4")
    return hashlib.sha256(plain.tobytes()).hexdigest()


def compare(found: Measured, exact: Measured | None, alike: Measured | None, tolerance: float) -> Outcome:
    """The outcome: ``exact`` is the earlier result of this kind of machine, ``alike`` that of any other."""
    if exact is not None:
        if found.sha256 != exact.sha256:
            return Outcome.PIXELS_CHANGED
        return Outcome.SCORES_CHANGED if furthest(found, exact) > SAME_SCORE else Outcome.SAME
    if alike is not None and furthest(found, alike) > tolerance:
        return Outcome.SCORES_CHANGED
    return Outcome.RECORDED


def furthest(found: Measured, known: Measured) -> float:
    """The largest change of a picture's score by any scorer that both have; NaN is infinitely far from a number."""
    both = found.scores.keys() & known.scores.keys()
    return max((_distance(found.scores[name], known.scores[name]) for name in both), default=0.0)


def _distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    distances = np.abs(np.asarray(ours) - np.asarray(theirs))
    both_nan = np.isnan(ours) & np.isnan(theirs)
    return float(np.nan_to_num(np.where(both_nan, 0.0, distances), nan=np.inf).max(initial=0.0))


def read_probe(bundle: Path, student: Student) -> Probe | None:
    """The probe of a bundle; None if it has none, or one of another student.

    Raises:
        BundleError: the file is not a probe.
    """
    path = bundle / FILE
    if not path.is_file():
        return None
    try:
        probe = from_json(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path} cannot be used ({error}): make it again with export.probe") from error
    return probe if probe.student == student.fingerprint() else None


def write_probe(bundle: Path, probe: Probe) -> None:
    """Write ``probe.json`` atomically."""
    text = json.dumps(to_json(probe), indent=2, allow_nan=False) + "\n"
    write_atomically(bundle / FILE, text.encode())


def to_json(probe: Probe) -> dict[str, Any]:
    """The probe as plain JSON values."""
    known = {
        runtime: {machine: measured_to(row) for machine, row in rows.items()} for runtime, rows in probe.known.items()
    }
    return {
        "format": probe.format,
        "student": probe.student,
        "score_tolerance": probe.score_tolerance,
        "pairs": [asdict(pair) for pair in probe.pairs],
        "known": known,
    }


def from_json(data: Mapping[str, Any]) -> Probe:
    """The inverse of ``to_json``."""
    if data["format"] != FORMAT:
        raise ValueError(f"format is {data['format']}: this version reads format {FORMAT}")
    known = {
        runtime: {machine: measured_from(row) for machine, row in rows.items()}
        for runtime, rows in data["known"].items()
    }
    pairs = tuple(Pair(**row) for row in data["pairs"])
    return Probe(data["student"], pairs, known, float(data["score_tolerance"]))


def measured_to(found: Measured) -> dict[str, Any]:
    """The results as plain JSON values; a NaN score becomes null."""
    scores = {name: [None if math.isnan(x) else x for x in values] for name, values in found.scores.items()}
    return {"sha256": list(found.sha256), "scores": scores}


def measured_from(row: Mapping[str, Any]) -> Measured:
    """The inverse of ``measured_to``."""
    scores = {
        name: tuple(math.nan if x is None else float(x) for x in values) for name, values in row["scores"].items()
    }
    return Measured(tuple(row["sha256"]), scores)
