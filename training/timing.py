"""The seconds that each part of a step takes, measured without synchronising the GPU in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds for each part of one step; on a GPU by CUDA events, which are read once at the end."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._parts: dict[str, list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``; a part may be entered several times, and inside of another."""
        start = self._now()
        yield
        self._parts.setdefault(name, []).append((start, self._now()))

    def seconds(self) -> dict[str, float]:
        """The seconds of every part so far, as ``{"teacher_s": ...}``."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return {f"{name}_s": round(sum(_between(*pair) for pair in pairs), 4) for name, pairs in self._parts.items()}

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory() -> dict[str, float]:
    """The peak memory of the GPU so far, in GB."""
    return {"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000  # type: ignore[arg-type]
