"""What a run's pictures show: which figure in which panel, and which picture in which place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from training import figures, timing
from training.timing import StepTimer

NAMES = ("reward_student", "reward_teacher", "heldout_validation", "gate_mean", "share_ahead", "shaping")
OTHERS = ("reward_validation", "loss", "diversity_validation", "gate_std", "gap")
PANELS = {
    "reward (0 = teacher's mean)": ("reward_student", "reward_teacher"),
    "held-out scorer on validation prompts": ("heldout_validation",),
    "gate and share of samples ahead": ("gate_mean", "share_ahead"),
    "shaping loss": ("shaping",),
}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: found.append(figure))
    return found


def test_each_curve_is_of_its_own_figure_by_step(kept: list[Figure]) -> None:
    """A validation's figures stand at the steps that have them."""
    log = [{"step": -1, **{name: 100.0 + k for k, name in enumerate((*NAMES, *OTHERS))}}]
    for step in range(50):
        row = {name: k + step / 100 for k, name in enumerate((*NAMES, *OTHERS)) if not name.endswith("_validation")}
        log.append({"step": step, **row})
    log[20]["heldout_validation"] = 7.0
    figures.curves(log, Path("x"))
    [figure] = kept
    assert [axis.get_title() for axis in figure.axes] == list(PANELS)
    for axis, names in zip(figure.axes, PANELS.values(), strict=True):
        lines = {str(line.get_label()): line.get_data() for line in axis.lines}
        assert list(lines) == [name.replace("_", " ") for name in names] and axis.get_xlabel() == "step"
        for name in names:
            steps, values = lines[name.replace("_", " ")]
            rows = [row for row in log if name in row]
            assert steps.tolist() == [row["step"] for row in rows]
            assert values.tolist() == [row[name] for row in rows]
    plt.close(figure)


def test_a_run_without_a_teacher_has_empty_panels(kept: list[Figure]) -> None:
    figures.curves([{"step": 0, "reward_student": 1.0}], Path("x"))
    assert [len(axis.lines) for axis in kept[0].axes] == [1, 0, 0, 0]
    plt.close(kept[0])


def test_a_grid_has_a_row_for_each_model_and_a_column_for_each_prompt(kept: list[Figure]) -> None:
    rows = {"teacher, 8 steps": torch.rand(3, 3, 4, 6), "student, 2 steps": torch.rand(2, 3, 4, 6)}
    figures.grid(rows, Path("x"))
    axes = np.array(kept[0].axes).reshape(2, 3)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        assert [axis.get_title(loc="left") for axis in line] == [label, "", ""]
        for k, axis in enumerate(line):
            shown = [np.asarray(image.get_array()) for image in axis.get_images()]
            assert len(shown) == (k < len(images)) and not axis.axison
            if shown:
                np.testing.assert_array_equal(shown[0], images[k].permute(1, 2, 0).numpy())
    plt.close(kept[0])


def test_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        figures.curves([{"step": k, "shaping": float(k)} for k in range(3)], tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert not plt.get_fignums(), "none is left open"


def test_on_a_gpu_the_parts_of_a_step_are_timed_by_events_that_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event counts milliseconds, and nobody waits for it before the end."""
    clock, waited = iter([0.0, 1500.0, 2000.0, 2250.0]), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1.0

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: Any) -> float:
            assert waited == ["all"]
            return float(end.at - self.at)

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: waited.append("all"))
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    timer = StepTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.part("teacher"):
            assert not waited
    assert timer.seconds() == {"teacher_s": 1.75}
