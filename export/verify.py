"""The proof of an export: the compiled form gives the pictures and scores of torch in float32.

Three checks, each of which catches what the others may miss: every stage on the inputs of torch's own stage, whole
pictures against diffusers' own loop, and the paired change of the rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import ExportError
from student.bundle import Student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import reproduce
from student.runtimes.compiled import Graphs
from student.runtimes.experts import STEPS, step_stage
from student.runtimes.manifest import DECODER, STAGE_NAMES, STEP, STEP_2, TEXT, Change, Parity, StageError
from student.runtimes.stages import StagedGraphs, text_outputs
from student.sampler import denoise

BATCHES = (1, 7)  # the smallest, and an odd one that no kernel is made for
LARGEST_PSNR_DB = 200.0  # stands for equality, which has no figure
PROMPTS = (
    "a small red heart above a large blue star on a gray background",
    "a large green ring on a navy background",
    "a small white circle left of a small black cross on a mint background",
    "Yellow triangle",
    "words that no vocabulary knows",
    "",
    "a large purple diamond below a small orange square",
    "a large red circle on a cream background",
)
# A change of a reward by a few hundredths is seen with so many; float32 changes none.
MORE_PROMPTS = (
    *PROMPTS,
    *(
        f"a {size} {color} {shape} {relation} a {other} {color_2} {shape_2} on a {back} background"
        for size, color, shape, relation, other, color_2, shape_2, back in zip(
            ("small", "large") * 12,
            ("red", "green", "blue", "yellow", "purple", "orange", "white", "black") * 3,
            ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart", "star") * 3,
            ("left of", "right of", "above", "below", "above") * 5,
            ("large", "small", "large") * 8,
            ("blue", "orange", "black", "white", "red", "green", "yellow") * 4,
            ("heart", "ring", "cross", "square", "circle") * 5,
            ("gray", "cream", "navy", "mint") * 6,
            strict=False,
        )
    ),
)
Score = Callable[[Any, Sequence[str]], Mapping[str, NDArray[np.float32]]]
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Tolerance:
    """The accepted limits.

    ``stage``: relative norm of a stage's error on the inputs of torch's stage. ``image``: absolute difference of one
    value of a picture in [0, 1]; ``psnr_db``: lower limit over all pictures; ``picture_db``: lower limit for every
    single one, so that a broken picture among good ones is noticed. ``reward``: fall of the mean paired reward, in
    standard deviations of the teacher. ``score``: difference of one standardised score of a compiled scorer.
    """

    stage: float
    image: float
    psnr_db: float | None
    reward: float
    score: float = 1e-3
    picture_db: float | None = None


FP32 = Tolerance(stage=1e-4, image=1e-3, psnr_db=None, reward=0.01)
FP16 = Tolerance(stage=1e-2, image=0.25, psnr_db=40.0, reward=0.03, picture_db=30.0)
BF16 = Tolerance(stage=5e-2, image=1.0, psnr_db=30.0, reward=0.05, picture_db=20.0)
INT8 = Tolerance(stage=1e-1, image=1.0, psnr_db=25.0, reward=0.05, picture_db=16.0)
FP8 = Tolerance(stage=1e-1, image=1.0, psnr_db=25.0, reward=0.05, picture_db=16.0)
TOLERANCES: Mapping[str, Tolerance] = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": INT8, "fp8": FP8}


def prove(
    graphs: Graphs, pipe: Any, student: Student, tolerance: Tolerance, prompts: Sequence[str] = PROMPTS,
    score: Score | None = None,
) -> tuple[dict[int, Parity], dict[str, StageError]]:  # fmt: skip
    """All three checks at every trained step count.

    Raises:
        ExportError: one of them exceeds the tolerance; the message names the stage that drifted.
    """
    stages = stage_errors(graphs, pipe, student) if isinstance(graphs, StagedGraphs) else {}
    parity = {
        steps: image_parity(graphs, pipe, student, steps, tolerance, prompts, score, stages) for steps in student.steps
    }
    worst = max(stages, key=lambda name: stages[name].relative, default="")
    if worst and not stages[worst].relative <= tolerance.stage:
        raise ExportError(f"{_drift(stages, tolerance)}, though the pictures agree; nothing was written")
    return parity, stages


def image_parity(
    graphs: Graphs, pipe: Any, student: Student, steps: int, tolerance: Tolerance = FP32,
    prompts: Sequence[str] = PROMPTS, score: Score | None = None, stages: Mapping[str, StageError] | None = None,
) -> Parity:  # fmt: skip
    """Compare whole pictures with diffusers' own loop, from the same seeds; ``stages`` are for the message.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    worst: dict[int, float] = {}
    pairs: list[Pair] = []
    for first, last in _batches(len(prompts)):
        part, seeds = prompts[first:last], range(first, last)
        pair = graphs.draw(part, seeds, steps), reproduce(pipe, student, part, seeds, steps)
        worst[last - first] = max(worst.get(last - first, 0.0), difference(*pair))
        pairs.append(pair)
    found = Parity(
        worst,
        tolerance.image,
        psnr_db(pairs),
        tolerance.psnr_db,
        _rewards(pairs, prompts, score),
        min(psnr_db([(ours[b : b + 1], theirs[b : b + 1])]) for ours, theirs in pairs for b in range(len(theirs))),
        tolerance.picture_db,
    )
    if failure := _failure(found, tolerance):
        where = _drift(stages or {}, tolerance) if isinstance(graphs, StagedGraphs) else ""
        where = where or "a fused graph has no stages to compare: export it with --form staged to see which one drifts"
        raise ExportError(f"the images of {steps} steps {failure}; {where}; nothing was written")
    return found


def stage_errors(graphs: StagedGraphs, pipe: Any, student: Student) -> dict[str, StageError]:
    """Each stage against torch's on the same inputs; the step stage at every sigma of the longest schedule."""
    model = family_of_student(pipe, student)
    prompts, steps = PROMPTS[: BATCHES[1]], max(student.steps)
    ids = [torch.from_numpy(part) for part in graphs.tokens.encode(prompts)]
    with torch.no_grad():
        condition = model.encode_ids(*ids)
        parts = [part for part in (condition.tokens_BLE, condition.pooled_BP) if part is not None]
        text = {name: part.numpy() for name, part in zip(text_outputs(student.family), parts, strict=True)}
        seen: list[tuple[float, Any, Any]] = []
        x = denoise(
            lambda x, sigma: model.velocity(x, sigma, condition),
            torch.from_numpy(noise(range(len(prompts)), student.latents.shape)),
            student.sigmas[steps],
            lambda _, sigma, x, v: seen.append((sigma, x.numpy(), v.numpy())),
        )
        pictures = model.decode(x).numpy()
    ours = graphs.encode(prompts)
    pairs: dict[str, list[Pair]] = {name: [] for name in STAGE_NAMES}
    pairs[TEXT] = [(ours[name], text[name]) for name in text]
    pairs[DECODER] = [(graphs.decode(x.numpy()), pictures)]
    for sigma, at, v in seen:
        pairs[step_stage(sigma, graphs.boundary)].append((graphs.velocity(at, sigma, text), v))
    return {stage: _stage_error(rows, per_step=stage in STEPS) for stage, rows in pairs.items() if rows}


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest absolute difference, or infinity if a value is not finite or the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    gap = np.abs(ours.astype(np.float64) - theirs)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def relative_norm(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """``|ours - theirs| / |theirs|``, or infinity if that is not finite or the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    reference = theirs.astype(np.float64)
    with np.errstate(all="ignore"):
        value = float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
    return value if np.isfinite(value) else float("inf")


def psnr_db(pairs: Sequence[Pair]) -> float:
    """The PSNR of values in [0, 1] over all pictures together; 0 if the shapes differ or a value is not finite."""
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return 0.0
    squares = np.concatenate([np.square(ours.astype(np.float64) - theirs).ravel() for ours, theirs in pairs])
    error = float(squares.mean())
    if not np.isfinite(error):
        return 0.0
    return LARGEST_PSNR_DB if error == 0 else min(-10 * float(np.log10(error)), LARGEST_PSNR_DB)


def _batches(count: int) -> list[tuple[int, int]]:
    """``count`` prompts as batches of 1, then of 7: first and last of each."""
    edges = [0, *range(BATCHES[0], count, BATCHES[1]), count]
    return list(zip(edges, edges[1:], strict=False))


def _rewards(pairs: Sequence[Pair], prompts: Sequence[str], score: Score | None) -> dict[str, Change]:
    if score is None or difference(pairs[0][0], pairs[0][1]) == float("inf"):
        return {}
    ours, theirs = (score(np.concatenate(images), prompts) for images in zip(*pairs, strict=True))
    changes = {name: ours[name].astype(np.float64) - theirs[name] for name in ours}
    return {name: _change(paired[np.isfinite(paired)]) for name, paired in changes.items() if np.isfinite(paired).any()}


def _change(paired_B: NDArray[np.float64]) -> Change:
    error = float(paired_B.std(ddof=1) / len(paired_B) ** 0.5) if len(paired_B) > 1 else 0.0
    return Change(float(paired_B.mean()), error, len(paired_B))


def _stage_error(pairs: Sequence[Pair], per_step: bool) -> StageError:
    relative = [relative_norm(*pair) for pair in pairs]
    return StageError(max(relative), max(difference(*pair) for pair in pairs), tuple(relative) if per_step else ())


def _failure(found: Parity, tolerance: Tolerance) -> str:
    """What exceeds the tolerance, or an empty string."""
    if not max(found.max_abs.values()) <= found.tolerance:
        figures = ", ".join(f"{value:.2g} at batch {batch}" for batch, value in found.max_abs.items())
        return f"differ from torch by {figures}: accepted is {found.tolerance:g}"
    if tolerance.psnr_db is not None and found.psnr_db is not None and not found.psnr_db >= tolerance.psnr_db:
        return f"have a PSNR of {found.psnr_db:.1f} dB against torch's: accepted is {tolerance.psnr_db:g} or more"
    if tolerance.picture_db is not None and found.picture_db is not None and found.picture_db < tolerance.picture_db:
        figure = f"{found.picture_db:.1f} dB in the worst picture"
        return f"have a PSNR of {figure}: accepted is {tolerance.picture_db:g} or more"
    for name, change in found.reward.items():
        if not change.mean >= -tolerance.reward:
            figure = f"{change.mean:+.3f} ± {change.error:.3f}"
            return f"change the reward {name} by {figure}: accepted is a fall of at most {tolerance.reward:g}"
    return ""


def _drift(stages: Mapping[str, StageError], tolerance: Tolerance) -> str:
    """The first stage, in the order of computation, that differs from torch."""
    for name in STAGE_NAMES:
        if name not in stages or stages[name].relative <= tolerance.stage:
            continue
        before = len(stages[STEP].per_step) if name == STEP_2 and STEP in stages else 0
        steps = [number for number, value in enumerate(stages[name].per_step) if not value <= tolerance.stage]
        where = f" from step {before + steps[0] + 1} on" if steps else ""
        figure = f"{stages[name].relative:.2g}, accepted is {tolerance.stage:g}"
        return f"the stage {name!r} drifted{where} (relative error {figure})"
    if not stages:
        return ""
    if tolerance is FP32:
        return "each stage alone agrees with torch, so the sigmas or the factors between them differ"
    worst = max(stages, key=lambda name: stages[name].relative)
    return f"the stage {worst!r} is the farthest from torch (relative error {stages[worst].relative:.2g})"
