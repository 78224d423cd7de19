"""Whether a preset's step fits into the GPU's memory, checked before anything is downloaded.

The figures are those that ``python -m benchmarks.train_memory`` counted; a configuration that none of them is of is not
judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from training.config import ConfigError, changed, leaves
from training.experiment.presets import preset as find_preset
from training.processes import Processes
from training.rats.config import RatsConfig

FIGURES = Path(__file__).with_name("memory_gb.json")
SPARE_GB = 1.5  # the driver, CUDA's libraries, and what a heap loses
WAYS = 3
# What rows of one preset may differ in, cheapest first.
CHEAPER = ("compute.tile_px", "optim.state", "compute.quantise")
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
    *BATCHES,
)
MATTERS_NOT = ("compute.device", "compute.save_minutes", "compute.compile", "optim.lr", "optim.warmup", "optim.decay")
PARTS_OF_A_BATCH = ("teacher", "validation")  # what draws several pictures at once


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
    fitting = [f"{way} ({gb:.0f} GB)" for way, gb in _ways(row, rows, config, total_gb) if gb + SPARE_GB <= total_gb]
    known = f"it would fit with {'; or '.join(fitting[:WAYS])}" if fitting else "no single setting makes it fit"
    return (
        f"preset {preset} needs {_most(row):.0f} GB, but the GPU has only {total_gb:.0f}: {known} "
        f"(computed, with {SPARE_GB} GB to spare; cheapest first)"
    )


def _ways(
    row: Mapping[str, Any], rows: list[dict[str, Any]], config: RatsConfig, total_gb: float
) -> Iterator[tuple[str, float]]:
    """What takes less, and how much, in the order of its price: time, precision, GPUs, size of the picture."""
    learning = max(gb for part, gb in row["peak"].items() if part not in PARTS_OF_A_BATCH)
    if (config.validation.batch, config.teacher.batch) != (1, 1):
        yield "validation.batch=1 and teacher.batch=1", learning
    for key in CHEAPER:
        for other in (one for one in rows if one["processes"] == row["processes"]):
            if key in other["settings"] and other["settings"] == {key: other["settings"][key], **row["settings"]}:
                yield f"{key}={other['settings'][key]}", _most(other)
    held = sum(row["held"].values())
    if not config.compute.quantise:
        for processes in (2, 4, 8):
            divided = held / processes + _most(row) - held
            if divided + SPARE_GB <= total_gb:
                yield f"compute.shard=true and compute.shard_frugal=true on {processes} GPUs, each", divided
                break
    for share in (2, 4):
        height, width = config.image.height_px // share // 64 * 64, config.image.width_px // share // 64 * 64
        rest = (_most(row) - held) * height * width / (config.image.height_px * config.image.width_px)
        yield f"image.height_px={height} and image.width_px={width}", held + rest


def _same(preset: str, config: RatsConfig, row: Mapping[str, Any]) -> bool:
    """Whether the row was counted of this configuration, as far as memory depends on it."""
    counted, own = dict(leaves(changed(find_preset(preset), row["settings"]))), dict(leaves(config))
    return all(own[key] == value for key, value in counted.items() if key.startswith(MATTER) and key not in MATTERS_NOT)


def _most(row: Mapping[str, Any]) -> float:
    return float(max(row["peak"].values()))
