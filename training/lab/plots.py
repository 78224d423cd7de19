"""The plots of the comparison's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from training.experiment.presets import shapes
from training.lab.cells import ABLATION_NFE, METHODS, NFES, VARIANTS, base
from training.lab.statistics import FloatArray, estimate

if TYPE_CHECKING:
    from training.lab.run import Result

MARKERS = "sD^v"
# Where a point's name stands, so that near ones do not cover each other: offset in points, and alignment.
LABELS = {"constant gate": ((-14, -22), "right"), "RATS": ((12, 14), "left")}
PUBLISHED, SMOOTHED = Path(__file__).with_name("published_curves.csv"), 15
PANELS = (("heldout", "held-out scorer"), ("right", "fully right (exact judge)"), ("diversity", "diversity (Vendi)"))


def quality(results: Sequence[Result], path: Path) -> None:
    """Each method's held-out score, judge and diversity against its step count, with the 50-step teacher as a line."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4))
    for axis, (measure, title) in zip(axes, PANELS, strict=True):
        for method in ("teacher", *METHODS, *VARIANTS):
            points = [(nfe, _runs(results, method, nfe, measure)) for nfe in NFES]
            drawn = [(nfe, estimate(runs)) for nfe, runs in points if runs]
            if drawn:
                x, y, error = zip(*((nfe, e.mean, e.error) for nfe, e in drawn), strict=True)
                axis.errorbar(x, y, yerr=error, label=method, marker="o", markersize=4, capsize=3, linewidth=1.2)
        reference = _runs(results, "teacher", base().teacher.reference_nfe, measure)
        if reference:
            axis.axhline(estimate(reference).mean, color="black", linestyle=":", label="teacher, 50 steps")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps (NFE)")
        axis.set_xticks(NFES)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curves(results: Sequence[Result], logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Rewards by training step at each step count: RATS here above, the published run below."""
    published = np.genfromtxt(PUBLISHED, delimiter=",", names=True)
    figure, axes = plt.subplots(2, len(NFES), figsize=(13, 6.5))
    for axis, nfe in zip(axes[0], NFES, strict=True):
        runs = [logs[r.key] for r in results if r.method == "RATS" and r.nfe == nfe and r.key in logs]
        rows = [[row for row in run if "reward_teacher" in row] for run in runs]
        if rows:
            student, teacher = (
                np.mean([[row[name] for row in run] for run in rows], axis=0)
                for name in ("reward_student", "reward_teacher")
            )
            _curve(axis, student, teacher)
        axis.set_title(f"here, {nfe} steps ({len(rows)} runs)", fontsize=10)
    for axis, nfe in zip(axes[1], (3, 5, 8), strict=True):
        _curve(axis, published[f"student_{nfe}nfe"], published[f"teacher_{nfe}nfe"])
        axis.set_title(f"published, {nfe} steps", fontsize=10)
        axis.set_xlabel("training step")
    axes[0][0].set_ylabel("standardised reward")
    axes[1][0].set_ylabel("HPSv2.1")
    axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def frontier(results: Sequence[Result], path: Path) -> None:
    """Held-out score against diversity at one step count: what each method pays for its score.

    The main comparison's points, of several seeds, are large and named in place; a legend names those of one seed.
    """
    figure, axis = plt.subplots(figsize=(10, 6.5))
    kept, named = 1.0, {}
    reference = [
        _runs(results, "teacher", base().teacher.reference_nfe, measure) for measure in ("diversity", "heldout")
    ]
    if all(reference):
        kept, score = (estimate(runs).mean for runs in reference)
        axis.plot(1.0, score, "k*", markersize=16, zorder=3)
        named["teacher, 50 steps"] = (1.0, score)
    axis.axvline(shapes().validation.min_diversity, color="black", linestyle=":", linewidth=1)
    found = dict.fromkeys(r.method for r in results if r.nfe == ABLATION_NFE)
    main = [name for name in ("teacher", *METHODS, *VARIANTS) if name in found]
    for i, method in enumerate([*main, *(name for name in found if name not in main)]):
        x, y = (estimate(_runs(results, method, ABLATION_NFE, measure)) for measure in ("diversity", "heldout"))
        large = {"marker": "o", "markersize": 11, "capsize": 4, "linewidth": 2.0, "zorder": 3, "color": f"C{i % 10}"}
        few = i - len(main)
        small = {"marker": MARKERS[few // 6 % 4], "markersize": 5, "linewidth": 0.7, "color": f"C{few % 6 + 4}"}
        style = large if method in main else {**small, "label": method, "alpha": 0.8}
        axis.errorbar(x.mean / kept, y.mean, yerr=y.error, **style)  # type: ignore[arg-type]
        if method in main:
            named[f"teacher, {ABLATION_NFE} steps" if method == "teacher" else method] = (x.mean / kept, y.mean)
    for name, place in named.items():
        offset, side = LABELS.get(name, ((12, 6), "left"))
        axis.annotate(name, place, offset, textcoords="offset points", fontsize=10, fontweight="bold", ha=side)
    axis.set_xlim(right=axis.get_xlim()[1] + 0.13)  # room for the names of the most varied
    axis.set_xlabel("diversity, as a share of the 50-step teacher's")
    axis.set_ylabel("held-out score")
    axis.set_title(f"{ABLATION_NFE} steps: what each method pays for its score (small: one seed)", fontsize=11)
    axis.grid(alpha=0.3)
    if len(found) > len(main):
        axis.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left", title="one seed")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _curve(axis: Axes, student: FloatArray, teacher: FloatArray) -> None:
    """Moving means, so that the batches' spread does not hide the course."""
    width = min(SMOOTHED, len(student))
    kernel, steps = np.ones(width) / width, np.arange(width - 1, len(student))
    for values, label, style in ((student, "student", "-"), (teacher, "teacher", "-"), (student - teacher, "gap", ":")):
        axis.plot(steps, np.convolve(values, kernel, "valid"), style, label=label, linewidth=1.2)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.grid(alpha=0.3)


def _runs(results: Sequence[Result], method: str, nfe: int, measure: str) -> list[list[float]]:
    rows = sorted((r for r in results if r.method == method and r.nfe == nfe), key=lambda r: r.seed)
    return [r.judge["right"] if measure == "right" else getattr(r, measure) for r in rows]
