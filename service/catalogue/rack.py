"""The students that one worker holds, by lane: its own thread draws with them while another loads and drops them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from service.catalogue.folder import Name
from service.queue.job import lane
from student.runtimes.runtime import Runtime, StepwiseRuntime


class Rack:
    """Runtimes by the lane that they serve, and what the worker tells others about them.

    Every change replaces a whole mapping, so that a reader in another thread sees the one or the other.
    """

    def __init__(self, runtimes: Sequence[Runtime] = ()) -> None:
        self.lanes: Mapping[str, Runtime] = {lane_of(runtime): runtime for runtime in runtimes}
        self._refused: Mapping[str, Mapping[str, str]] = {}
        self.info: dict[str, Any] = {"host": socket.gethostname(), "models": {}, "refused": {}, "runtime": "",
                                     "max_batch": 1, "shows_steps": False}  # fmt: skip
        self._tell()

    @property
    def names(self) -> set[str]:
        """What is held, as ``id/version``."""
        return {name_of(runtime) for runtime in self.lanes.values()}

    @property
    def max_images(self) -> dict[str, int]:
        """The most images of a batch, by lane."""
        return {lane: runtime.max_batch for lane, runtime in self.lanes.items()}

    def put(self, runtime: Runtime) -> None:
        """From now on jobs of this student can be drawn."""
        self.lanes = {**self.lanes, lane_of(runtime): runtime}
        self._refused = {name: why for name, why in self._refused.items() if name != name_of(runtime)}
        self._tell()

    def drop(self, name: str) -> None:
        """Hold this student no longer. A batch that is being drawn with it is not touched."""
        self.lanes = {lane: runtime for lane, runtime in self.lanes.items() if name_of(runtime) != name}
        self._tell()

    def refuse(self, name: str, attempt: str, reason: str) -> None:
        """Tell that a student could not be loaded."""
        self._refused = {**self._refused, name: {"attempt": attempt, "reason": reason}}
        self._tell()

    def refused(self, name: str) -> Mapping[str, str] | None:
        """The last failure to load a student, if it is not held."""
        return self._refused.get(name)

    def _tell(self) -> None:
        runtimes = list(self.lanes.values())
        self.info["refused"] = self._refused
        self.info["models"] = {name_of(runtime): _about(runtime) for runtime in runtimes}
        if runtimes:
            self.info.update(_about(runtimes[0]))


def name_of(runtime: Runtime) -> str:
    return str(Name(runtime.student.id, runtime.student.version))


def lane_of(runtime: Runtime) -> str:
    return lane(runtime.student.id, runtime.student.version)


def _about(runtime: Runtime) -> dict[str, Any]:
    return {
        "runtime": runtime.name,
        "max_batch": runtime.max_batch,
        "shows_steps": isinstance(runtime, StepwiseRuntime),
    }
