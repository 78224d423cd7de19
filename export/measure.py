"""Measures the scores of a student's own pictures: the scale and the distributions of a scorer added to a bundle.

Every raw score is stored as soon as it is known, so that an interrupted measurement resumes where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.errors import ExportError, NoOnnxForm
from export.journal import Journal
from export.scorers import export_scorer
from rewards.interface import Reward, RewardError
from rewards.registry import find, fingerprint
from rewards.serving import open_reward
from rewards.twostage import TwoStage
from student.bundle import NAME, Scorer, Student, read_student, rewrite_student
from student.reference import at_key, distribution, with_distribution
from student.runtimes.buckets import sizes_of
from student.runtimes.load import load
from student.runtimes.machine import find_gpu, free_bytes
from student.runtimes.manifest import RUNTIMES
from student.runtimes.placement import numbers_of
from student.runtimes.runtime import Runtime
from student.runtimes.scoring import Scorers
from student.runtimes.sizes import Size, own_size
from student.writing import write_atomically

GB = 10**9
KEPT = ".measured-{name}.jsonl"
FEWEST = 8  # pictures that a distribution is made of
CALIBRATION = "calibration.txt"
PROOF_PROMPTS = 32  # kept in the bundle for the proof of its exports
# Published rewards in float32, of which a checkpoint is read at a time.
REWARD_BYTES = {
    **{"pickscore": 4 * GB, "hpsv2.1": 4 * GB, "imagereward": 2 * GB, "clip": 2 * GB, "aesthetic": 2 * GB},
    **{"geneval": 2 * GB, "hpsv3": 31 * GB},
}
Say = Callable[[str], None]
Scores = dict[tuple[int, Size], list[float | None]]


@dataclass(frozen=True)
class Measurement:
    """A request to measure rewards on ``images`` pictures of the prompts at each step count and size."""

    rewards: tuple[str, ...]
    prompts: tuple[str, ...]
    images: int
    runtime: str = "auto"
    threads: int = 1
    say: Say = print


def add_scorers(bundle: Path, asked: Measurement) -> Student:
    """Add each reward to the bundle, compiled if possible, with its scale and its distributions.

    0 is the mean of the student's own pictures at its largest step count and own size, 1 is their standard deviation.

    Raises:
        ExportError, BundleError: a reward cannot be opened or cannot distinguish images, or no runtime works.
    """
    student = read_student(bundle)
    check_memory(bundle, asked)
    opened = {_name(reward): (reward, _open(reward)) for reward in asked.rewards}
    rows = {name: _scorer(bundle, student, name, *pair, asked.say) for name, pair in opened.items()}
    plain = replace(student, scorers=rows)
    scorers = Scorers(bundle, plain, asked.threads, open_reward)
    if left_out := sorted(rows.keys() - set(scorers.names)):
        raise ExportError(f"the reward {rows[left_out[0]].reward!r} cannot run here; nothing was added")
    runtime = load(bundle, asked.runtime, asked.threads)
    found = _measure(bundle, runtime, scorers, asked, {name: row.source_sha256 for name, row in rows.items()})
    for name, scores in found.items():
        student = _with_scorer(student, name, rows[name], scores, len(asked.prompts))
    rewrite_student(bundle, student)
    _keep_prompts(bundle, asked.prompts)
    for name in rows:
        _kept(bundle, name).unlink(missing_ok=True)
    return student


def check_rewards(rewards: Sequence[str]) -> None:
    """Open each reward once, before the time that a model takes.

    Raises:
        ExportError: there is too little memory for them, or one cannot be opened.
    """
    _require_memory(rewards, 0, "opening")
    for reward in rewards:
        _name(reward)
        _open(reward)


def check_memory(bundle: Path, asked: Measurement) -> None:
    """Refuse if the student and its rewards together do not fit into main memory.

    Raises:
        ExportError: they do not; the message says how much they need and how much is free.
    """
    _require_memory(asked.rewards, drawing_bytes(bundle), "measuring", f" on {bundle}")


def _require_memory(rewards: Sequence[str], beside: int, doing: str, where: str = "") -> None:
    free, needed = free_bytes(), sum(REWARD_BYTES.get(reward, 0) for reward in rewards) + beside
    if free is not None and needed > free:
        raise ExportError(
            f"{doing} {', '.join(rewards)}{where} needs about {needed / 1e9:.2f} GB of memory, and "
            f"{free / 1e9:.2f} GB are free"
        )


def drawing_bytes(bundle: Path) -> int:
    """Main memory for generating: compiled graphs, else the pipeline in float32, or its largest part with a GPU."""
    runtimes = [folder for folder in (bundle / RUNTIMES).glob("[!.]*") if folder.is_dir()]
    if runtimes:
        return max(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in runtimes)
    numbers = numbers_of(bundle)
    if find_gpu()[0] is not None:
        return 2 * max(numbers.values(), default=0)
    return 4 * sum(numbers.values())


def _name(reward: str) -> str:
    """The scorer's name in responses and metrics: the reward's, without characters that a name cannot have."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in reward).strip("-.")[:64]
    if not NAME.fullmatch(name):
        raise ExportError(f"the reward {reward!r} has a name from which no scorer's name can be made")
    return name


def _open(reward: str) -> Reward:
    try:
        return find(reward)
    except RewardError as error:
        raise ExportError(f"{error}") from error


def _scorer(bundle: Path, student: Student, name: str, reward_name: str, reward: Reward, say: Say) -> Scorer:
    """The scorer with raw scores (mean 0, std 1); writes its graph if it has one."""
    scorer = Scorer(f"scorers/{name}.onnx", 0.0, 1.0, "heldout", fingerprint(reward_name, reward), reward_name)
    file = bundle / scorer.file
    if isinstance(reward, TwoStage) and not _is_there(file, scorer.source_sha256):
        try:
            worst = export_scorer(file, reward, scorer.source_sha256, sizes_of(bundle, student))
            say(f"{name}: compiled, at most {worst:.1e} standard deviations from torch")
        except NoOnnxForm as error:
            say(f"{name}: runs in torch, because {error}")
    return scorer


def _is_there(file: Path, source_sha256: str) -> bool:
    manifest = file.with_suffix(".json")
    if not (file.is_file() and manifest.is_file()):
        return False
    found: Mapping[str, object] = json.loads(manifest.read_text("utf-8"))
    return found.get("source_sha256") == source_sha256


def _measure(
    bundle: Path, runtime: Runtime, scorers: Scorers, asked: Measurement, sources: Mapping[str, str]
) -> dict[str, Scores]:
    student = runtime.student
    sizes: Sequence[Size] = getattr(runtime, "sizes", (own_size(student),))
    cells = [(steps, size) for size in sizes for steps in student.steps]
    journals = {name: _journal(bundle, name, sources[name], asked) for name in scorers.names}
    known = {name: _read(journal, asked.images) for name, journal in journals.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("generating and scoring", total=len(cells) * asked.images)
        for cell in cells:
            done = min(len(known[name].get(cell, [])) for name in known)
            progress.advance(bar, done)
            for first in range(done, asked.images, runtime.max_batch):
                numbers = range(first, min(first + runtime.max_batch, asked.images))
                scores = _draw_and_score(runtime, scorers, asked, cell, numbers)
                for name in known:
                    journals[name].add(_row(cell, first, scores[name]))
                    del known[name].setdefault(cell, [])[first:]
                    known[name][cell] += scores[name]
                progress.advance(bar, len(numbers))
    return known


def _draw_and_score(
    runtime: Runtime, scorers: Scorers, asked: Measurement, cell: tuple[int, Size], numbers: Sequence[int]
) -> dict[str, list[float | None]]:
    steps, size = cell
    prompts = [asked.prompts[number % len(asked.prompts)] for number in numbers]
    at = {} if size == own_size(runtime.student) else {"size": size}
    images = runtime.draw(prompts, list(numbers), steps, **at)
    found = scorers.score(images, prompts)
    return {
        name: [float(value) if math.isfinite(value) else None for value in score_B] for name, score_B in found.items()
    }


def _kept(bundle: Path, name: str) -> Path:
    return bundle / "scorers" / KEPT.format(name=name)


def _journal(bundle: Path, name: str, source: str, asked: Measurement) -> Journal:
    """A scorer's raw scores so far: with other weights or prompts the measurement starts again."""
    return Journal(_kept(bundle, name), {"source": source, "prompts": list(asked.prompts)})


def _read(journal: Journal, images: int) -> Scores:
    scores: dict[tuple[int, Size], list[float | None]] = {}
    for row in journal.rows:
        cell = scores.setdefault((row["steps"], (row["height"], row["width"])), [])
        del cell[row["first"] :]
        cell += row["raw"]
    return {cell: values[:images] for cell, values in scores.items()}


def _row(cell: tuple[int, Size], first: int, raw: Sequence[float | None]) -> dict[str, object]:
    return {"steps": cell[0], "height": cell[1][0], "width": cell[1][1], "first": first, "raw": list(raw)}


def _with_scorer(student: Student, name: str, row: Scorer, scores: Scores, prompts: int) -> Student:
    """The student with this scorer, its scale and a distribution for each step count and size."""
    finite = {cell: [value for value in values if value is not None] for cell, values in scores.items()}
    for (steps, _), values in finite.items():
        if len(values) < FEWEST:
            raise ExportError(
                f"the reward {row.reward!r} scored {len(values)} pictures of {steps} steps: {FEWEST} or more are needed"
            )
    own = (max(student.steps), own_size(student))
    scale = distribution(finite[own])
    if not scale.std > 1e-12 * max(1.0, abs(scale.mean)):
        raise ExportError(f"the reward {row.reward!r} gave the same score for every picture; nothing was added")
    reference = None
    for cell in [own, *(cell for cell in finite if cell != own)]:
        found = distribution([(value - scale.mean) / scale.std for value in finite[cell]], prompts)
        reference = with_distribution(reference, at_key(student, *cell), found)
    assert reference is not None
    return replace(
        student,
        scorers={**student.scorers, name: replace(row, mean=scale.mean, std=scale.std)},
        reward_reference={**student.reward_reference, name: reference},
    )


def _keep_prompts(bundle: Path, prompts: Sequence[str]) -> None:
    """Store prompts for the proof of an export in the bundle, if training left none."""
    path = bundle / CALIBRATION
    if not path.is_file():
        write_atomically(path, ("\n".join(prompts[:PROOF_PROMPTS]) + "\n").encode())


def read_prompt_file(file: Path) -> tuple[str, ...]:
    """The prompts of a file, one per line.

    Raises:
        ExportError: no such file, or fewer than two prompts.
    """
    try:
        lines = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file} cannot be read as a file of prompts: {error}") from error
    if len(lines) < 2:
        raise ExportError(f"{file} has {len(lines)} prompts: accepted are two or more, one per line")
    return lines


def check_images(images: int) -> int:
    """Raises ExportError for too few pictures."""
    if images < FEWEST:
        raise ExportError(f"images is {images}: accepted is {FEWEST} or more")
    return images
