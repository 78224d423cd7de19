"""The plots of the laboratory's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.lab.cells import CONFIDENCE, METHODS, NFES, RATS
from training.lab.gates import STRATA
from training.lab.outcome import BOTH, HIGH, LOW, Outcome
from training.lab.references import AUTOENCODER, TRUTH, teacher_name
from training.lab.statistics import FloatArray, envelope

COLOURS = {name: f"C{i}" for i, name in enumerate(METHODS)}
LINES = {TRUTH: ":", AUTOENCODER: "--"}
SHARES = np.linspace(0.5, 1.1, 121)


def curves(outcome: Outcome, teacher: str, path: Path) -> None:
    """Judge against diversity, by stratum and step count: each method's envelope, averaged over its seeds.

    The lines of the truth and of the autoencoder, and the teacher's own point, are in every panel.
    """
    strata = (BOTH, *STRATA)
    figure, axes = plt.subplots(len(NFES), len(strata), figsize=(13, 7), squeeze=False, sharex=True, sharey=True)
    for row, nfe in zip(axes, NFES, strict=True):
        for axis, stratum in zip(row, strata, strict=True):
            for method in METHODS:
                if height := _envelopes(outcome, teacher, method, nfe, stratum):
                    axis.step(SHARES, np.mean(height, 0), color=COLOURS[method], label=f"{method} ({len(height)})")
            _references(axis, outcome, teacher, stratum)
            axis.axvspan(LOW, HIGH, color="black", alpha=0.05)
            axis.set_title(f"{stratum}, {nfe} step{'s' * (nfe > 1)}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("diversity, as a share of the good teacher's")
    for row in axes:
        row[0].set_ylabel("right (exact judge)")
    lines, names = axes[-1][0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=9, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure.suptitle(f"{teacher_name(teacher)} (seeds in brackets)", fontsize=11)
    _save(figure, path)


def gates(outcome: Outcome, path: Path) -> None:
    """The gate's mean weight, and how far the teacher is ahead, by stratum over each run of two methods."""
    runs: Mapping[tuple[str, str], list[Mapping[int, Mapping[str, Mapping[str, float]]]]] = {
        (teacher, method): [
            {stop.step: stop.gate for stop in run.stops if stop.gate}
            for run in outcome.results
            if (run.teacher, run.method) == (teacher, method)
        ]
        for teacher in dict.fromkeys(run.teacher for run in outcome.results)
        for method in (RATS, CONFIDENCE)
        if outcome.seeds(teacher, method)
    }
    wide = max(1, len(runs))
    figure, axes = plt.subplots(2, wide, figsize=(5 * wide, 6), squeeze=False, sharex=True, sharey="row")
    for column, ((teacher, method), of_method) in enumerate(runs.items()):
        for row, name in enumerate(("weight", "gap")):
            for i, stratum in enumerate(STRATA):
                _course(axes[row][column], of_method, stratum, name, f"C{i}")
        axes[0][column].set_title(f"{method}, {teacher_name(teacher)}", fontsize=10)
        axes[1][column].axhline(0, color="black", linewidth=0.5)
        axes[1][column].set_xlabel("training step")
    axes[0][0].set_ylabel("mean weight of the gate")
    axes[1][0].set_ylabel("teacher's reward minus the student's")
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=8)
    _save(figure, path)


def _course(
    axis: Axes,
    runs: Sequence[Mapping[int, Mapping[str, Mapping[str, float]]]],
    stratum: str,
    name: str,
    colour: str,
) -> None:
    """The mean over the runs by training step, with each run as a thin line."""
    steps = sorted({step for run in runs for step in run})
    for run in runs:
        own = [(step, run[step][stratum][name]) for step in sorted(run) if stratum in run[step]]
        if own:
            axis.plot(*zip(*own, strict=True), color=colour, linewidth=0.5, alpha=0.4)
    found = [[run[step][stratum][name] for run in runs if stratum in run.get(step, {})] for step in steps]
    shown = [(step, float(np.mean(values))) for step, values in zip(steps, found, strict=True) if values]
    if shown:
        axis.plot(*zip(*shown, strict=True), color=colour, linewidth=2, label=stratum)
    axis.grid(alpha=0.3)


def _envelopes(outcome: Outcome, teacher: str, method: str, nfe: int, stratum: str) -> list[FloatArray]:
    """One for each training seed."""
    sweeps = [outcome.stops(teacher, method, seed, nfe) for seed in outcome.seeds(teacher, method)]
    return [envelope(*outcome.points(stops, stratum), SHARES) for stops in sweeps if stops]


def _references(axis: Axes, outcome: Outcome, teacher: str, stratum: str) -> None:
    for name, style in LINES.items():
        _, right = outcome.points([outcome.references[name]], stratum)
        axis.axhline(right[0], color="black", linestyle=style, linewidth=1, label=name)
    share, right = outcome.points([outcome.references[teacher_name(teacher)]], stratum)
    axis.plot(share[0], right[0], "k*", markersize=11, label="its teacher")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
