"""The worker: claim → draw → finish, in three threads, so that the device waits for nothing but work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from service.models.loaded import LoadedModels
from service.observe.logs import keeping_private
from service.observe.tracer import Tracing
from service.quality.feedback import FeedbackPolicy
from service.queue.consumer import Consumer
from service.results.store import ResultStore
from service.worker.batch import Batch
from service.worker.claims import Claims, hand_back
from service.worker.device import Device
from service.worker.execution import DeviceLost, Executed, execute
from service.worker.finishing import Finisher
from service.worker.fit import Fit
from service.worker.heartbeat import Heartbeat
from service.worker.late_scores import LateScores
from service.worker.neighbours import Neighbours
from service.worker.probing import Prober, Run
from service.worker.scoring import ScorePolicy
from service.worker.settling import NO_FEEDBACK, Settler
from service.worker.signing import ImageSigner
from service.worker.step_callback import StepCallback
from service.worker.watchdog import Bounds, Watchdog
from student.runtimes.runtime import CpuSharing, Runtime

NEXT_S = 0.2
WATCHED_OVER_S = 1.0  # where watching costs something, shorter calls are drawn to their end though nobody wants them

ALL = ScorePolicy()

log = logging.getLogger(__name__)


class Worker:
    """Draws what waits in the queue until ``stopping`` is set; a batch that was begun is ended first.

    ``on_hang(what)`` is called from another thread when a call takes longer than ``call_timeout_s`` (0: than its like
    ever took, by far); it does not return. ``batch`` is the most images that share a call (0: as the load asks for).
    While ``neighbours`` draw, runtimes that can do so take fewer threads.
    """

    def __init__(
        self, runtimes: Runtime | LoadedModels, consumer: Consumer, heartbeat: Heartbeat, store: ResultStore,
        stopping: threading.Event, *, provenance: bool = True, tracing: Tracing | None = None,
        signer: ImageSigner | None = None, policy: ScorePolicy = ALL, call_timeout_s: float = 0.0, probe_s: float = 0.0,
        batch: int = 0,
        feedback: FeedbackPolicy = NO_FEEDBACK,
        neighbours: Neighbours | None = None,
        on_hang: Callable[[str], object] = log.critical,
    ) -> None:  # fmt: skip
        loaded = runtimes if isinstance(runtimes, LoadedModels) else LoadedModels([runtimes])
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._tracing = tracing or Tracing()
        self._watchdog = Watchdog(on_hang)
        self._neighbours = neighbours
        self._fit = Fit()
        self.device = Device()
        self._bounds = Bounds(self.device, call_timeout_s, lambda: loaded.warm_up_s)
        settler = Settler(consumer, store, heartbeat, stopping, provenance=provenance, signer=signer, feedback=feedback)
        late = LateScores(consumer, heartbeat, self._guard_scorer, policy, feedback=feedback)
        self._finisher = Finisher(settler, late, self._guard_scorer, policy)
        self._prober = Prober(loaded, consumer, probe_s)
        self.claims = Claims(loaded, consumer, heartbeat, self.device, self._finisher.refuse, batch)

    def run(self) -> None:
        """Work until ``stopping`` is set; a batch that was claimed and not begun is handed back.

        Raises:
            DeviceLost: the device fails at everything; what it could not draw has been handed back.
        """
        with self._watchdog:
            try:
                with self.claims:
                    while not self._stopping.is_set():
                        if batch := self.claims.next(NEXT_S):
                            self._draw(batch)
                        if run := self._prober.next(idle=batch is None):
                            self._probe(run)
            finally:
                self.drain()

    def step(self) -> None:
        """Draw what waits, as one batch, and see it settled and scored; if nothing does, wait a moment for it."""
        if batch := self.claims.claim():
            self._draw(batch)
        else:
            self.claims.wait()
        self.drain()

    def drain(self, patience_s: float | None = None) -> bool:
        """Return when everything that was drawn is settled and scored (True), or after ``patience_s`` (False)."""
        return self._finisher.drain(patience_s)

    def counts(self) -> dict[str, int]:
        """What the worker counts, since its start."""
        usage = self.device.usage
        return {
            "device_busy_ms": round(usage.busy_s * 1000),
            "device_starved_ms": round(usage.starved_s * 1000),
            **self._prober.counts,
        }

    def _draw(self, batch: Batch) -> None:
        trace = self._tracing.batch(batch.token, batch.jobs)
        watching = self._watching(batch)
        if batch.suspect:
            self.drain()  # it may end this process: nothing that is drawn shall be lost with it
        started_at = time.monotonic()
        drawn = trace.begin("draw")
        with keeping_private(*batch.prompts), self._drawing(batch):
            guard = partial(self._guard, batch)
            executed = execute(batch.runtime, batch.jobs, watching, guard, self._fit)
        drawn()
        self._report(batch, executed)
        self._finisher.submit(batch, executed, started_at, trace, watching.ended if watching else ())
        if executed.device_lost:
            undrawn = [batch.claimed[number] for number in sorted(executed.undrawn)]
            hand_back(self._consumer, self._heartbeat, undrawn, spared=True)
            raise DeviceLost(f"the device fails; {len(undrawn)} jobs were handed back")

    def _probe(self, run: Run) -> None:
        """Draw one picture of a probe, and have it judged with the others once it is the last one."""
        student = run.runtime.student
        shape = (
            student.id,
            student.version,
            student.image.height,
            student.image.width,
            student.image.frames or 0,
            run.pair.steps,
        )
        self.device.begin(shape, 1, time.monotonic())
        try:
            with self._watchdog.watching("a call for a probe", self._bounds.of(shape, 1)):
                complete = self._prober.draw(run)
        except Exception:  # an engine may fail in any way; jobs find out for themselves
            return self._prober.failed(run)
        finally:
            self.device.end()
        if complete:
            images = self._prober.take(run)
            self._finisher.beside(lambda: self._prober.settle(run, images))

    def _watching(self, batch: Batch) -> StepCallback | None:
        """Where a runtime is slower when it is watched, only previews and long calls are worth it."""
        usual_s = self.device.predicted_s(batch.shape, batch.images)
        long = usual_s is None or usual_s > WATCHED_OVER_S
        costs = getattr(batch.runtime, "watching_costs", False)
        if costs and not long and not any(job.previews for job in batch.jobs):
            return None
        return StepCallback(batch, self._heartbeat, self._finisher)

    @contextmanager
    def _drawing(self, batch: Batch) -> Iterator[None]:
        self.device.begin(batch.shape, batch.images, batch.waiting_since)
        try:
            with self._beside_neighbours(batch.runtime):
                yield
        finally:
            self.device.end()

    @contextmanager
    def _beside_neighbours(self, runtime: Runtime) -> Iterator[None]:
        cpu_sharing: CpuSharing | None = getattr(runtime, "cpu_sharing", None)
        if cpu_sharing is None or self._neighbours is None:
            yield
            return
        with self._neighbours.drawing() as cpu_sharing.crowded:
            yield

    @contextmanager
    def _guard(self, batch: Batch, images: int) -> Iterator[None]:
        with self._watchdog.watching(f"a call for {images} images", self._bounds.of(batch.shape, images)):
            yield

    def _guard_scorer(self, what: str) -> AbstractContextManager[None]:
        return self._watchdog.watching(what, self._bounds.longest_s)

    def _report(self, batch: Batch, executed: Executed) -> None:
        for call in executed.calls:
            self.device.measured(batch.shape, len(call.slots), call.inference_s)
        drawn = {slot.job for call in executed.calls for slot in call.slots}
        about = {
            "batch": batch.token,
            "job_ids": [batch.jobs[number].id for number in sorted(drawn)],
            "request_ids": [batch.jobs[number].request_id for number in sorted(drawn)],
            "images": [len(call.slots) for call in executed.calls],
            "inference_s": round(sum(call.inference_s for call in executed.calls), 4),
        }
        log.info("generated %d of %d jobs", len(drawn), len(batch.jobs), extra=about)
