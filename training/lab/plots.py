"""The laboratory's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from training.lab.cells import METHODS, NFES, base
from training.lab.statistics import estimate

if TYPE_CHECKING:
    from training.lab.run import Result

PANELS = (("heldout", "held-out scorer"), ("right", "fully right (exact judge)"), ("diversity", "diversity (Vendi)"))


def quality(results: Sequence[Result], path: Path) -> None:
    """Each method's held-out score, judge and diversity against its step count, with the 50-step teacher as a line."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4))
    for axis, (measure, title) in zip(axes, PANELS, strict=True):
        for method in ("teacher", *METHODS):
            points = [(nfe, _runs(results, method, nfe, measure)) for nfe in NFES]
            drawn = [(nfe, estimate(runs)) for nfe, runs in points if runs]
            if drawn:
                x, y, error = zip(*((nfe, e.mean, e.error) for nfe, e in drawn), strict=True)
                axis.errorbar(x, y, yerr=error, label=method, marker="o", markersize=4, capsize=3, linewidth=1.2)
        reference = _runs(results, "teacher", base().reference_nfe, measure)
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


def _runs(results: Sequence[Result], method: str, nfe: int, measure: str) -> list[list[float]]:
    rows = sorted((r for r in results if r.method == method and r.nfe == nfe), key=lambda r: r.seed)
    return [r.judge["right"] if measure == "right" else getattr(r, measure) for r in rows]
