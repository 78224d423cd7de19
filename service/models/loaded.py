"""The students that one worker has loaded, by lane: one thread runs them while another loads and drops them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from service.models.folder import Name
from service.queue.job import lane
from service.queue.status import WorkerState
from student.probe import Probe
from student.runtimes.runtime import Runtime, StepwiseRuntime
from student.runtimes.sizes import size_name

log = logging.getLogger(__name__)


class LoadedModels:
    """Runtimes by the lane they serve, and what the worker's heartbeat reports about them.

    Every change replaces a whole mapping, so that a reader in another thread sees either the old or the new one.
    """

    def __init__(self, runtimes: Sequence[Runtime] = ()) -> None:
        self.lanes: Mapping[str, Runtime] = {lane_of(runtime): runtime for runtime in runtimes}
        self.probes: Mapping[str, Probe] = {}
        self._probed: Mapping[str, Mapping[str, Any]] = {}
        self._load_s: dict[str, float] = {}
        self._refused: Mapping[str, Mapping[str, str]] = {}
        self.info: dict[str, Any] = {"host": socket.gethostname(), "models": {}, "refused": {}, "runtime": "",
                                     "max_batch": 1, "shows_steps": False}  # fmt: skip
        self._publish()

    @property
    def names(self) -> set[str]:
        """The loaded students, as ``id/version``."""
        return {name_of(runtime) for runtime in self.lanes.values()}

    @property
    def warm_up_s(self) -> float:
        """The longest warm-up of a loaded student."""
        return max((getattr(runtime, "warm_up_s", 0.0) for runtime in self.lanes.values()), default=0.0)

    def put(self, runtime: Runtime, load_s: float = 0.0, probe: Probe | None = None) -> None:
        """From now on jobs of this student, which took ``load_s`` to load and warm up, can be drawn, and its probe."""
        self._load_s[name_of(runtime)] = round(load_s, 3)
        self._probed = {name: result for name, result in self._probed.items() if name != name_of(runtime)}
        others = {lane: each for lane, each in self.probes.items() if lane != lane_of(runtime)}
        self.probes = {**others, lane_of(runtime): probe} if probe else others
        self.lanes = {**self.lanes, lane_of(runtime): runtime}
        self._refused = {name: why for name, why in self._refused.items() if name != name_of(runtime)}
        self._publish()
        about = self.info["models"][name_of(runtime)]
        student = runtime.student
        log.info("student loaded", extra={"model": student.id, "model_version": student.version, **about})

    def drop(self, name: str) -> None:
        """Remove a student. A batch that it is running is not affected."""
        self.lanes = {lane: runtime for lane, runtime in self.lanes.items() if name_of(runtime) != name}
        self._publish()

    def probed(self, runtime: Runtime, result: Mapping[str, Any]) -> None:
        """Tell what the last probe of a student has found: outcome, at_s, and what it was compared with."""
        self._probed = {**self._probed, name_of(runtime): result}
        self._publish()

    def refuse(self, name: str, attempt: str, reason: str) -> None:
        """Record that a student could not be loaded."""
        self._refused = {**self._refused, name: {"attempt": attempt, "reason": reason}}
        self._publish()

    def refused(self, name: str) -> Mapping[str, str] | None:
        """The last failure to load a student, if it is not loaded."""
        return self._refused.get(name)

    def _publish(self) -> None:
        runtimes = list(self.lanes.values())
        self.info["refused"] = self._refused
        self.info["state"] = WorkerState.READY if runtimes else WorkerState.LOADING
        self.info["models"] = {name_of(runtime): self._about(runtime) for runtime in runtimes}
        if runtimes:
            self.info.update(self._about(runtimes[0]))

    def _about(self, runtime: Runtime) -> dict[str, Any]:
        return {
            "runtime": runtime.name,
            "max_batch": runtime.max_batch,
            "shows_steps": isinstance(runtime, StepwiseRuntime),
            "sides_px": asdict(found) if (found := getattr(runtime, "size_range", None)) else None,
            "load_s": self._load_s.get(name_of(runtime), 0.0),
            "warm_up_s": round(getattr(runtime, "warm_up_s", 0.0), 3),
            "lengths": {size_name(size): each.record() for size, each in getattr(runtime, "lengths", {}).items()},
            "probe": self._probe_of(runtime),
        }

    def _probe_of(self, runtime: Runtime) -> Mapping[str, Any]:
        waiting = {"outcome": "waiting" if lane_of(runtime) in self.probes else "none"}
        return self._probed.get(name_of(runtime), waiting)


def name_of(runtime: Runtime) -> str:
    return str(Name(runtime.student.id, runtime.student.version))


def lane_of(runtime: Runtime) -> str:
    return lane(runtime.student.id, runtime.student.version)
