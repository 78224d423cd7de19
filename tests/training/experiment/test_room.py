"""Too little memory for a preset is said in one sentence, from the figures that were counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from training.config import changed
from training.experiment import room
from training.experiment.presets import preset

COUNTED = [
    {
        "name": "plain",
        "preset": "flux-dev",
        "settings": {},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 26.0, "learnt": 2.0},
        "peak": {"teacher": 29.0, "student": 29.7, "backward": 32.0, "update": 28.6, "validation": 31.0},
    },
    {
        "name": "narrow",
        "preset": "flux-dev",
        "settings": {"compute.quantise": "nf4"},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 9.0, "learnt": 2.0},
        "peak": {"teacher": 12.0, "student": 12.7, "backward": 15.0, "update": 11.6, "validation": 21.0},
    },
    {
        "name": "narrow, in tiles",
        "preset": "flux-dev",
        "settings": {"compute.quantise": "nf4", "compute.tile_px": 256},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 9.0, "learnt": 2.0},
        "peak": {"teacher": 11.0, "student": 11.5, "backward": 13.0, "update": 11.6, "validation": 12.0},
    },
    {
        "name": "sharded, offloaded",
        "preset": "flux-dev",
        "settings": {"optim.state": "offload"},
        "processes": 8,
        "limit_gb": None,
        "held": {"weights": 3.0, "learnt": 0.5},
        "peak": {"teacher": 5.0, "student": 5.5, "backward": 7.0, "update": 5.6, "validation": 5.0},
    },
]


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory_gb.json").write_text(json.dumps(COUNTED))
    monkeypatch.setattr(room, "FIGURES", tmp_path / "memory_gb.json")


def test_what_fits_is_let_through() -> None:
    assert room.too_large("flux-dev", preset("flux-dev"), 33.5) == ""
    assert room.too_large("sd35-medium", preset("sd35-medium"), 1.0) == "", "of what was not counted nothing is said"


def test_what_does_not_fit_names_what_would_the_cheapest_first() -> None:
    sentence = room.too_large("flux-dev", preset("flux-dev"), 24.0)
    assert sentence.startswith("preset flux-dev needs 32 GB, but the GPU has only 24: it would fit with ")
    # 28 / 2 + 4 = 18 on two GPUs; half of each side leaves a quarter of 4: 29, too much for 24
    ways = re.findall(r"(compute\.quantise=nf4 \(21 GB\)|on 2 GPUs, each \(18 GB\)|image\.\w+)", sentence)
    assert ways == ["compute.quantise=nf4 (21 GB)", "on 2 GPUs, each (18 GB)"]
    assert "optim.state" not in sentence, "that was counted on 8 GPUs"
    assert "validation.batch=1" not in sentence, "32 GB are the backward pass's, which it does not change"
    narrow = changed(preset("flux-dev"), {"compute.quantise": "nf4"})
    sentence = room.too_large("flux-dev", narrow, 20.0)
    assert (
        sentence.startswith("preset flux-dev needs 21 GB") and "validation.batch=1 and teacher.batch=1 (15" in sentence
    )
    assert "or compute.tile_px=256 (13 GB)" in sentence.replace("; or", " or")
    assert "compute.tile_px" not in room.too_large("flux-dev", preset("flux-dev"), 24.0), (
        "of this alone nothing is known"
    )
    assert room.too_large("flux-dev", narrow, 24.0) == ""
    assert "but the GPU has only 2: no single setting makes it fit (computed" in room.too_large("flux-dev", narrow, 2.0)


def test_what_a_run_has_already_is_not_advised() -> None:
    ones = changed(preset("flux-dev"), {"compute.quantise": "nf4", "validation.batch": 1, "teacher.batch": 1})
    rows = json.loads(room.FIGURES.read_text())
    for row in rows:
        row["settings"] |= {"validation.batch": 1, "teacher.batch": 1}
    room.FIGURES.write_text(json.dumps(rows))
    sentence = room.too_large("flux-dev", ones, 20.0)
    assert sentence.startswith("preset flux-dev needs 21 GB") and "batch=1" not in sentence
    half = changed(ones, {"validation.batch": 2})
    assert room.too_large("flux-dev", half, 20.0) == "", "that was not counted"


def test_what_changes_no_memory_is_counted_all_the_same_and_what_does_is_not_judged() -> None:
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"optim.lr": 1e-3, "steps": 7}), 24.0)
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"lora.rank": 64}), 24.0) == ""
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"image.height_px": 1024}), 24.0) == ""
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"validation.batch": 1}), 24.0) == ""
    whole = {"lora.rank": 0, "compute.weights": "fp32"}
    rows = json.loads(room.FIGURES.read_text())
    room.FIGURES.write_text(json.dumps([{**rows[0], "settings": whole}]))
    config = changed(preset("flux-dev"), whole)
    assert room.too_large("flux-dev", config, 2.0) != ""
    assert room.too_large("flux-dev", changed(config, {"teacher.weights": "bf16"}), 2.0) == "", "that was not counted"


def test_a_way_must_leave_something_to_spare_and_gpus_that_share_nothing_are_each_one() -> None:
    plain = preset("flux-dev")
    assert "compute.quantise" not in room.too_large("flux-dev", plain, 22.0), "21 GB, and 1.5 to spare"
    assert room.too_large("flux-dev", plain, 24.0, 8) == room.too_large("flux-dev", plain, 24.0) != ""
