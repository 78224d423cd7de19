"""Checks that a runtime can be made here, before anything is computed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from export.errors import ExportError
from student.base import pipeline_folder
from student.bundle import Student
from student.runtimes.buckets import Bucket, stage_name
from student.runtimes.experts import STEPS, stages_of
from student.runtimes.manifest import DECODER, STEP, STEP_2, TEXT
from student.runtimes.placement import read_header

WORKING_COPIES = 3  # the weights while they are traced: the module's, the program's, the file's
PARTS = {"transformer": STEP, "transformer_2": STEP_2, "vae": DECODER}  # all other weights are the text stage's
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0}


@dataclass(frozen=True)
class Estimate:
    """The number of parameters in a stage, and the expected size of its file in bytes."""

    stage: str
    parameters: int
    disk_bytes: int


NVIDIA = "https://pypi.nvidia.com"
PACKAGES = {
    "tensorrt": f"tensorrt-cu13 --extra-index-url {NVIDIA}",
    "tensorrt_rtx": "fewstep[tensorrt-rtx]",
    "openvino": "fewstep[openvino]",
}


def missing_library(*names: str) -> str | None:
    """One sentence on the first library that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install {PACKAGES.get(name, name)}"
    return None


def estimates(
    bundle: Path, student: Student, form: str, precision: str, buckets: Sequence[Bucket] = ()
) -> list[Estimate]:
    """The size of each graph, from the headers of the weights' files, which are not read.

    Weights that are float16 on disk stay so in a float32 graph (with a Cast), and so need half the space.
    """
    numbers: dict[str, int] = {}
    disk: dict[str, float] = {}
    for path in sorted(pipeline_folder(bundle).glob("*/*.safetensors")):
        stage = PARTS.get(path.parent.name, TEXT)
        for row in read_header(path).values():
            count, width = prod(row["shape"]), min(BYTES[precision], _width(row["dtype"]))
            numbers[stage] = numbers.get(stage, 0) + count
            disk[stage] = disk.get(stage, 0.0) + count * (width if stage in STEPS else _width(row["dtype"]))
    if form == "staged":
        needed = [stage for stage in stages_of(student, boundary_of(bundle)) if stage in numbers]
        rows = [Estimate(stage, numbers[stage], int(disk[stage])) for stage in needed]
        sized = [row for row in rows if row.stage != TEXT]  # each bucket has a step and a decoder of its own
        return rows + [replace(row, stage=stage_name(row.stage, bucket)) for bucket in buckets for row in sized]
    whole = sum(numbers.values()), int(sum(disk.values()))
    return [Estimate(f"{steps}-steps", *whole) for steps in student.steps]


def boundary_of(bundle: Path) -> float | None:
    """The sigma below which the bundle's pipeline calls its second transformer; None if it has only one."""
    index = json.loads((pipeline_folder(bundle) / "model_index.json").read_text("utf-8"))
    found: float | None = index.get("boundary_ratio")
    return found


def check_disk(bundle: Path, wanted: list[Estimate]) -> None:
    """Refuse an export that could not finish: it needs twice the files, as old ones stay until new ones are verified.

    Raises:
        ExportError: there is not enough disk space.
    """
    needed = 2 * sum(row.disk_bytes for row in wanted)
    free = shutil.disk_usage(bundle).free
    if free < needed:
        raise ExportError(f"{bundle} needs {_gb(needed)} of disk space for this, and {_gb(free)} are free")


def memory_bytes(wanted: list[Estimate]) -> int:
    """The memory that tracing the largest of them is expected to need."""
    return max((WORKING_COPIES * 4 * row.parameters for row in wanted), default=0)


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _width(dtype: object) -> float:
    return {"F64": 8.0, "F32": 4.0, "I64": 8.0, "I32": 4.0}.get(str(dtype), 2.0)
