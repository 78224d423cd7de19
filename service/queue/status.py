"""What the queue reports about itself: its depth, its live workers, and what each key used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FAILED = "failed:"  # before the name of a background task, among the queue's counters
DRAINED = 6  # the exit code of a worker that an operator has drained: it is not to be started again


class WorkerState(StrEnum):
    """What a worker does; the last two are what an operator may want of it (order.lua)."""

    LOADING = "loading"  # it holds no student yet
    READY = "ready"
    PAUSED = "paused"  # it claims nothing
    DRAINING = "draining"  # nor will it ever: it ends what it holds, and then its process


@dataclass(frozen=True)
class Worker:
    """What a live worker reports in its heartbeats.

    ``models`` has, by ``id/version``, runtime, max_batch and shows_steps of each loaded model; ``refused`` the reason
    and the attempt of each that could not be loaded. The other fields are those of its first model. ``gpus`` has, by
    UUID, the state of each visible GPU: busy (0 to 1), used_bytes, total_bytes, power_w, temperature_c.
    ``jobs`` is how many jobs it holds.
    """

    id: str
    runtime: str
    host: str
    max_batch: int
    shows_steps: bool
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    load_s: float = 0.0
    warm_up_s: float = 0.0
    gpus: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    state: WorkerState = WorkerState.READY
    jobs: int = 0

    @property
    def claims(self) -> bool:
        """Whether it takes work from the queue."""
        return self.state is WorkerState.READY

    def sides_px(self, model: str) -> Mapping[str, Any] | None:
        """Of ``id/version``, if its runtime draws more sizes than it has names for: what their sides may be."""
        return self.models.get(model, {}).get("sides_px")

    def shows(self, model: str) -> bool:
        """Whether it has previews of ``id/version``. A worker of an older release reports its only model."""
        return bool(self.models.get(model, {}).get("shows_steps")) if self.models else self.shows_steps


@dataclass(frozen=True)
class Depth:
    """The queue at one moment; the counters only grow (until the server loses its data)."""

    waiting: int
    running: int
    oldest_s: float
    workers: int
    counters: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """The usage of a key on one day; ``day_s`` is the Unix time of its start, ``work`` the cost in thousands of
    pixel-steps."""

    key: str
    day_s: int
    jobs: int
    images: int
    work: int


def read_worker(name: str, info: Mapping[str, Any], order: str = "") -> Worker:
    """A worker as it describes itself in its heartbeats. An ``order`` holds before it knows: the queue sees to that."""
    state = order or info.get("state", WorkerState.READY)
    return Worker(
        name,
        info.get("runtime", ""),
        info.get("host", ""),
        info.get("max_batch", 1),
        info.get("shows_steps", False),
        {model: {"runtime": "", "shows_steps": False, **held} for model, held in info.get("models", {}).items()},
        info.get("refused", {}),
        info.get("load_s", 0.0),
        info.get("warm_up_s", 0.0),
        info.get("gpus", {}),
        WorkerState(state) if state in list(WorkerState) else WorkerState.READY,
        info.get("jobs", 0),
    )


def read_usages(day_s: int, counts: Mapping[str, str]) -> Iterator[Usage]:
    """The counters of one day, by key."""
    for key in sorted({name.rpartition("|")[0] for name in counts}):
        jobs, images, work = (int(counts.get(f"{key}|{what}", 0)) for what in ("jobs", "images", "work"))
        yield Usage(key, day_s, jobs, images, work)
