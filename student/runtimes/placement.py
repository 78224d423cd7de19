"""The device and type in which a student's own pipeline runs, decided before any weights are loaded.

Legend: sizes in bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from student.base import NETWORKS, pipeline_folder
from student.bundle import BundleError
from student.runtimes.machine import Gpu

OFFLOADS = ("auto", "off", "encoders", "cpu")
SMALL = 200_000_000  # numbers in a transformer below which float32 costs nothing that matters
BF16_FROM = (8, 0)  # compute capability
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS = 2 * 2**30  # at least, of a picture of 1024 px; see benchmarks/serving_memory.py
USABLE = 0.92  # of the GPU's memory: the driver and the library take the rest
TRANSFORMERS = NETWORKS
DENOISING = (*TRANSFORMERS, "vae")


@dataclass(frozen=True)
class Placement:
    """``offload``: "off" (all on the device), "encoders" (encoders are on it only while they encode) or "cpu" (they
    stay on the CPU)."""

    device: str
    dtype: str
    offload: str = "off"


def numbers_of(bundle: Path) -> dict[str, int]:
    """The number of parameters of each part of a pipeline, from the headers of its files."""
    counts: dict[str, int] = {}
    for path in sorted(pipeline_folder(bundle).glob("*/*.safetensors")):
        part = path.parent.name
        counts[part] = counts.get(part, 0) + sum(prod(row["shape"]) for row in read_header(path).values())
    return counts


def read_header(path: Path) -> dict[str, dict[str, list[int]]]:
    """Type and shape of each tensor in a safetensors file; the tensors are not read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def place(
    numbers: Mapping[str, int], gpu: Gpu | None, offload: str = "auto", in_float32: Collection[str] = (),
    activations: int = ACTIVATIONS, scorers: int = 0,
) -> Placement:  # fmt: skip
    """The device and type of the network, and where the prompt encoders are kept.

    ``in_float32`` are parts that always run in float32, ``activations`` the bytes that a call needs beside the weights,
    ``scorers`` those that the student's scorers hold already.

    Raises:
        BundleError: an unknown offload, or a GPU that is too small for the network.
    """
    if offload not in OFFLOADS:
        raise BundleError(f"offload is {offload!r}: accepted are {', '.join(OFFLOADS)}")
    if gpu is None:
        return Placement("cpu", "float32")
    dtype = _type(numbers.get("transformer", 0), gpu)
    float32 = {*in_float32, *(("vae",) if dtype == "float16" else ())}
    taken = {part: count * (4 if part in float32 else WIDTH[dtype]) for part, count in numbers.items()}
    denoising = sum(taken.get(part, 0) for part in DENOISING)
    everything, room = sum(taken.values()), int(gpu.memory_bytes * USABLE) - scorers
    needed = {"off": everything + activations, "encoders": max(everything, denoising + activations)}
    needed["cpu"] = denoising + activations
    chosen = next((name for name in needed if needed[name] <= room), "") if offload == "auto" else offload
    if not chosen or needed[chosen] > room:
        least = min(needed.values()) if offload == "auto" else needed[offload]
        raise BundleError(
            f"the network needs {least / 2**30:.1f} GiB of GPU memory in {dtype}, but {gpu.name} has only "
            f"{room / 2**30:.1f} GiB available"
            + (f" beside the {scorers / 2**30:.1f} GiB of its scorers" if scorers else "")
        )
    return Placement("cuda", dtype, chosen)


def _type(transformer: int, gpu: Gpu) -> str:
    if transformer < SMALL:
        return "float32"
    major, _, minor = gpu.compute_capability.partition(".")
    return "bfloat16" if (int(major), int(minor or 0)) >= BF16_FROM else "float16"
