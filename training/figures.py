"""Figures of a run: sample grids and reward curves, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

GROUPS = (
    ("reward (0 = teacher's mean)", ("reward_student", "reward_teacher")),
    ("held-out scorer on validation prompts", ("heldout_validation",)),
    ("gate and share of samples ahead", ("gate_mean", "share_ahead")),
    ("shaping loss", ("shaping",)),
)


def grid(rows: Mapping[str, Tensor], path: Path) -> None:
    """One row of pictures (B, 3, H, W) for each label; column k holds the same prompt and seed in every row."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.5 * len(rows)), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        line[0].set_title(label, loc="left", fontsize=9)
        for axis in line:
            axis.axis("off")
        for axis, image_CHW in zip(line, images, strict=False):
            axis.imshow(image_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
    figure.tight_layout(pad=0.4)
    _save(figure, path)


def still(images: Tensor) -> Tensor:
    """Pictures unchanged; for videos (B, F, 3, H, W), the middle frame of each."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


def curves(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """The run's log: rewards, the held-out score, the gate and the shaping loss against the step."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5))
    for axis, (title, names) in zip(axes.flat, GROUPS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in log if name in row]
            if points:
                x, y = np.array(points).T
                axis.plot(x, y, label=name.replace("_", " "), marker="." if len(points) < 40 else None, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Without metadata, so that the same run writes the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
