"""The golden probe at work: when a worker draws a picture of it, and what it makes of the answer.

Real jobs come first: a picture of a probe is drawn when none waits, else one a minute at most, so that a job is never
put off by more than one call.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from service.models.loaded import LoadedModels, name_of
from service.queue.consumer import Consumer
from student.probe import (
    Measured,
    Outcome,
    Pair,
    Probe,
    compare,
    draw_pair,
    furthest,
    measured,
    measured_from,
    measured_to,
)
from student.runtimes.machine import machine_kind
from student.runtimes.runtime import FloatArray, Runtime

PATIENCE_S = 60.0  # how long a probe that is due waits for the device to be idle, before each of its pictures
AGAIN_S = 60.0  # after a probe whose outcome could not be settled
BAD = (Outcome.PIXELS_CHANGED, Outcome.SCORES_CHANGED, Outcome.FAILED)

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A student's probe: when it is due, and the pictures of the run that is under way."""

    runtime: Runtime
    probe: Probe
    due_at: float
    images: list[FloatArray] = field(default_factory=list)

    @property
    def pair(self) -> Pair:
        return self.probe.pairs[len(self.images)]

    @property
    def complete(self) -> bool:
        return len(self.images) == len(self.probe.pairs)


class Prober:
    """The probes of the loaded students, at the start and every ``every_s`` (0: never).

    ``next``, ``draw`` and ``failed`` belong to the drawing thread, ``settle`` to any other.
    """

    def __init__(
        self, loaded: LoadedModels, consumer: Consumer, every_s: float, clock: Callable[[], float] = time.monotonic,
        machine: Callable[[str], str] = machine_kind,
    ) -> None:  # fmt: skip
        self._loaded = loaded
        self._consumer = consumer
        self._every_s = every_s
        self._clock = clock
        self._machine = machine
        self._runs: dict[str, Run] = {}
        self._put_off_until = clock() + PATIENCE_S
        self.counts: dict[str, int] = {}

    def next(self, idle: bool) -> Run | None:
        """A run of which a picture is to be drawn now; ``idle``: no job waits."""
        if not self._every_s:
            return None
        now = self._clock()
        due = [run for run in self._current(now) if run.due_at <= now]
        if not due:
            self._put_off_until = now + PATIENCE_S
            return None
        if not idle and now < self._put_off_until:
            return None
        self._put_off_until = now + PATIENCE_S
        return min(due, key=lambda run: run.due_at)

    def draw(self, run: Run) -> bool:
        """Draw the next picture of a run; True if it was the last one."""
        run.images.append(draw_pair(run.runtime, run.pair))
        return run.complete

    def take(self, run: Run) -> list[FloatArray]:
        """The pictures of a run that is complete; the next one is due after the usual time."""
        images, run.images = run.images, []
        run.due_at = self._clock() + self._every_s
        return images

    def failed(self, run: Run) -> None:
        """The picture could not be drawn."""
        log.exception("the probe of %s failed", name_of(run.runtime))
        self.take(run)
        self._report(run, Outcome.FAILED, {})

    def settle(self, run: Run, images: list[FloatArray]) -> None:
        """Score the pictures of a run, compare them with what is known, and say what was found."""
        scores = [run.runtime.score(image, [pair.prompt]) for image, pair in zip(images, run.probe.pairs, strict=True)]
        try:
            self._compare(run, measured(images, scores))
        except RedisError as error:
            log.warning("the probe of %s is drawn again: %s", name_of(run.runtime), error)
            run.due_at = self._clock() + AGAIN_S

    def _compare(self, run: Run, found: Measured) -> None:
        machine = self._machine(run.runtime.name)
        known = run.probe.known.get(run.runtime.name, {})
        alike = next(iter(known.values()), None)
        exact, source = known.get(machine), "bundle"
        key = "|".join([name_of(run.runtime), run.probe.student[:16], run.runtime.name, machine])
        if exact is None and (text := self._consumer.probe_record(key)):
            exact, source = measured_from(json.loads(text)), "recorded"
        outcome = compare(found, exact, alike, run.probe.score_tolerance)
        if outcome is Outcome.RECORDED:
            self._consumer.probe_record(key, json.dumps(measured_to(found)))
            source = "recorded"
        reference = exact or alike
        shift = round(furthest(found, reference), 4) if reference else 0.0
        self._report(run, outcome, {"source": source, "machine": machine, "score_shift": min(shift, 1e6)})

    def _report(self, run: Run, outcome: Outcome, about: Mapping[str, Any]) -> None:
        self.counts = {**self.counts, f"probe_{outcome}": self.counts.get(f"probe_{outcome}", 0) + 1}
        self._loaded.probed(run.runtime, {"outcome": str(outcome), "at_s": int(time.time()), **about})
        level = logging.ERROR if outcome in BAD else logging.INFO
        student = run.runtime.student
        extra = {"model": student.id, "model_version": student.version, "runtime": run.runtime.name, **about}
        log.log(level, "probe: %s", outcome, extra=extra)

    def _current(self, now: float) -> list[Run]:
        """A run for each student that is held and has a probe."""
        held = {lane: (runtime, self._loaded.probes.get(lane)) for lane, runtime in self._loaded.lanes.items()}
        kept = {lane: run for lane, run in self._runs.items() if lane in held and held[lane][0] is run.runtime}
        fresh = {lane: Run(runtime, probe, now) for lane, (runtime, probe) in held.items() if probe}
        self._runs = {**fresh, **kept}
        return list(self._runs.values())
