"""The number of pictures in one call: what a device's memory and kernels allow, measured once and stored.

A picture's bytes belong to its seed. A library may choose another kernel for another number of rows, so a batch size is
only used if each of its pictures is bit for bit the one that is generated alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from student.runtimes.runtime import FloatArray

FILE = "batches.json"
DOUBLING = (1, 2, 4, 8, 16, 32, 64)
GAIN = 1.05  # a call of twice as many pictures must draw so much faster than two calls, or it is not worth its wait
MISSES = 2  # batch sizes that change bytes, after which no larger one is tried
Draw = Callable[[Sequence[str], Sequence[int]], FloatArray]


@dataclass(frozen=True)
class Measured:
    """For one picture size: seconds of a call by its number of pictures, and the numbers that do not change bytes."""

    seconds: Mapping[int, float]
    together: tuple[int, ...]
    largest: int


def split(count: int, together: Sequence[int]) -> list[slice]:
    """``count`` rows in calls of sizes from ``together`` (which has 1), the largest first; if empty, in one call."""
    if not together:
        return [slice(0, count)]
    parts, at = [], 0
    while at < count:
        size = max(size for size in together if size <= count - at)
        parts.append(slice(at, at + size))
        at += size
    return parts


def independent(draw: Draw, sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes whose pictures are bit for bit those that are generated alone; this also warms them up."""
    most = max(sizes)
    prompts = _prompts(most)
    alone = np.concatenate([draw([prompts[b]], [b]) for b in range(most)])
    equal = [size for size in sizes if size > 1 and np.array_equal(draw(prompts[:size], range(size)), alone[:size])]
    return (1, *equal)


def measure(
    draw: Draw,
    out_of_memory: Callable[[Exception], bool],
    sizes: Sequence[int] = DOUBLING,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Double the batch while memory allows it and it pays; the first call of each size warms up, the second is timed.

    ``largest`` is the last size that is faster per picture than the one before it and does not change bytes.
    """
    seconds: dict[int, float] = {}
    misses = 0
    alone: list[FloatArray] = []
    together, largest = [1], 1
    for size in sizes:
        prompts = _prompts(size)
        try:
            while len(alone) < size:
                alone.append(draw([prompts[len(alone)]], [len(alone)]))
            drawn = draw(prompts, range(size))
            started = clock()
            draw(prompts, range(size))
            seconds[size] = clock() - started
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        if size > 1 and not np.array_equal(drawn, np.concatenate(alone[:size])):
            misses += 1
            if misses == MISSES:
                break
            continue  # another size may have the kernel of one
        if size > 1:
            together.append(size)
            if seconds[size] * GAIN > size / largest * seconds[largest]:
                break
        largest = size
    return Measured(seconds, tuple(size for size in together if size <= largest), largest)


def _prompts(count: int) -> list[str]:
    return [" ".join(["a"] * b) for b in range(count)]


def read_table(folder: Path, key: str) -> dict[str, Measured]:
    """The measurements for each picture size on this machine; empty if there are none."""
    try:
        rows = json.loads((folder / FILE).read_text("utf-8")).get(key, {})
        return {
            name: Measured(
                {int(size): float(s) for size, s in row["seconds"].items()}, tuple(row["together"]), int(row["largest"])
            )
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_table(folder: Path, key: str, table: Mapping[str, Measured]) -> None:
    """Store it in the bundle, beside the tables of other machines; a read-only bundle is measured at each start."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        path = folder / FILE
        try:
            tables = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            tables = {}
        tables = tables if isinstance(tables, dict) else {}
        tables[key] = {name: asdict(row) for name, row in table.items()}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        unfinished.write_text(json.dumps(tables, indent=2) + "\n", "utf-8")
        unfinished.replace(path)
