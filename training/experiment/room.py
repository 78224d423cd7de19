"""Whether a preset's step fits into the GPU's memory, checked before anything is downloaded.

The figures are those that ``python -m benchmarks.train_memory`` counted; a configuration that none of them is of is not
judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.config import ConfigError, changed, leaves
from training.experiment.presets import preset as find_preset
from training.experiment.ways import fitting_ways
from training.processes import Processes
from training.rats.config import RatsConfig

FIGURES = Path(__file__).with_name("memory_gb.json")
SPARE_GB = 1.5  # the driver, CUDA's libraries, and what a heap loses
WAYS = 3
BATCHES = ("teacher.batch", "validation.batch")
MATTER = (
    "image",
    "lora",
    "compute",
    "gradient",
    "optim",
    "reward.weights",
    "reward.frames",
    "teacher.weights",
    "student.init",
    *BATCHES,
)
MATTERS_NOT = ("compute.device", "compute.save_minutes", "compute.compile", "optim.lr", "optim.warmup", "optim.decay")


def require_room(preset: str, config: RatsConfig) -> None:
    """Refuse a run whose step is known not to fit.

    Raises:
        ConfigError: it does not; names what would make it fit.
    """
    if config.compute.device in ("auto", "cuda") and torch.cuda.is_available():
        total_gb = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
        if sentence := too_large(preset, config, total_gb, Processes().size):
            raise ConfigError(sentence)


def too_large(preset: str, config: RatsConfig, total_gb: float, processes: int = 1) -> str:
    """One sentence where the step does not fit into ``total_gb``, else nothing."""
    rows = [row for row in json.loads(FIGURES.read_text()) if row["preset"] == preset]
    spread = processes if config.compute.shard else 1
    row = next((row for row in rows if row["processes"] == spread and _same(preset, config, row)), None)
    if row is None or _most(row) + SPARE_GB <= total_gb:
        return ""
    fitting = fitting_ways(row, rows, config, total_gb - SPARE_GB)[:WAYS]
    said = "; or ".join(f"{way} ({gb:.0f} GB)" for way, gb in fitting)
    known = f"it would fit with {said}" if fitting else "no two settings make it fit"
    return (
        f"preset {preset} needs {_most(row):.0f} GB, but the GPU has only {total_gb:.0f}: {known} "
        f"(computed, with {SPARE_GB} GB to spare; single settings first, the cheapest of them first)"
    )


def _same(preset: str, config: RatsConfig, row: Mapping[str, Any]) -> bool:
    """Whether the row was counted of this configuration, as far as memory depends on it."""
    counted, own = (_with_init(one) for one in (changed(find_preset(preset), row["settings"]), config))
    return all(own[key] == value for key, value in counted.items() if key.startswith(MATTER) and key not in MATTERS_NOT)


def _with_init(config: RatsConfig) -> dict[str, Any]:
    """Every value by its key; of a student's initial weights only whether there are any: they are a second network."""
    return {**dict(leaves(config)), "student.init": bool(config.student.init)}


def _most(row: Mapping[str, Any]) -> float:
    return float(max(row["peak"].values()))
