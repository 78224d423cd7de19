"""Claims the next batch while the device draws: late enough that it is full, early enough that nothing idles."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from redis.exceptions import RedisError

from service.models.loaded import LoadedModels
from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job, PayloadError, lane, shape
from service.queue.rounds import Round, round_of
from service.worker.batch import Batch, Maker, maker_of
from service.worker.batch_size import sizes
from service.worker.device import Device
from service.worker.execution import Failure
from service.worker.heartbeat import Heartbeat
from student.runtimes.runtime import Runtime
from student.runtimes.sizes import draws

WAIT_S = 1.0
PAUSE_AFTER_ERROR_S = 0.2
SHORTEST_MARGIN_S = 0.005
LOOK_EVERY_S = 0.25

Refuse = Callable[[Maker, Claimed, Failure], None]

log = logging.getLogger(__name__)


class Claims:
    """At most one batch ahead of the one that is drawn.

    ``refuse`` ends a job that this worker cannot draw; ``batch`` is the most images that share a call, 0: as the load
    and the times of calls ask for.
    """

    def __init__(
        self, loaded: LoadedModels, consumer: Consumer, heartbeat: Heartbeat, device: Device, refuse: Refuse,
        batch: int = 0,
    ) -> None:  # fmt: skip
        self._loaded = loaded
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._device = device
        self._refuse = refuse
        self._batch = batch
        self._margin_s = SHORTEST_MARGIN_S
        self._ahead: Batch | None = None
        self._suspect = False  # what is drawn may end this process: nothing else is claimed meanwhile
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def __enter__(self) -> Claims:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()
        self.hand_back()

    def stop(self) -> None:
        """Claim nothing any more."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def next(self, patience_s: float) -> Batch | None:
        """The next batch, as soon as there is one; None after ``patience_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._ahead is not None, patience_s)
            batch, self._ahead = self._ahead, None
            if batch and patience_s:
                self._device.begin(batch.shape, batch.images, batch.waiting_since)
                self._suspect = batch.suspect
            self._changed.notify_all()
            return batch

    def hand_back(self) -> None:
        """Return the batch that was not begun to the queue; no attempt is counted."""
        if batch := self.next(0.0):
            hand_back(self._consumer, self._heartbeat, batch.claimed)

    def claim(self) -> Batch | None:
        """A batch of what waits, held by the heartbeat; None if nothing waits that can be drawn."""
        lanes = self._loaded.lanes
        started = time.monotonic()
        if not lanes:
            return None
        most = {lane: min(runtime.max_batch, self._batch or runtime.max_batch) for lane, runtime in lanes.items()}
        claimed = self._consumer.claim(most, sizes={} if self._batch else self._sizes(most))
        self._margin_s = max(SHORTEST_MARGIN_S, 2 * (time.monotonic() - started))
        if not claimed:
            return None
        self._heartbeat.hold(claimed)
        return self._readable(claimed, lanes)

    def wait(self) -> None:
        """Return when something may be claimed, or after a moment."""
        if lanes := self._loaded.lanes:
            self._consumer.wait(lanes, WAIT_S)
        else:
            self._stopping.wait(PAUSE_AFTER_ERROR_S)

    def _sizes(self, most: Mapping[str, int]) -> dict[tuple[str, str], tuple[int, ...]]:
        """How many images the next batch of a lane and shape has, by how many wait."""
        found = {}
        for (model, version, *dimensions), load in self._device.loads().items():
            if (name := lane(model, version)) in most:
                found[name, shape(*dimensions)] = sizes(load, most[name])
        return found

    def _readable(self, claimed: Sequence[Claimed], lanes: Mapping[str, Runtime]) -> Batch | None:
        # They share a lane; one that cannot be read does not tell which.
        runtime = next((lanes[name] for name in map(_lane_of, claimed) if name in lanes), next(iter(lanes.values())))
        rounds: list[tuple[Claimed, Round]] = []
        for one in claimed:
            found = read(one, runtime)
            if isinstance(found, Failure):
                self._refuse(maker_of(runtime), one, found)
            else:
                rounds.append((one, found))
        if not rounds:
            return None
        return Batch(runtime, tuple(one for one, _ in rounds), tuple(found for _, found in rounds))

    def _run(self) -> None:
        duty = self._heartbeat.background.duty("claims", vital=True)
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception as error:  # of any kind: a worker that stopped claiming would still seem healthy
                duty.failed(error)
                self._stopping.wait(PAUSE_AFTER_ERROR_S)
            else:
                duty.succeeded()

    def _turn(self) -> None:
        if self._ahead is not None:
            return self._wait_for_taker()
        if not self._heartbeat.claims:  # a worker that waits for work would take the wake-ups of others
            self._stopping.wait(LOOK_EVERY_S)
            return
        if self._suspect and not self._device.wait_until_idle(WAIT_S):
            return
        if not self._device.wait_until_free(self._margin_s, WAIT_S) or self._stopping.is_set():
            return
        if batch := self.claim():
            with self._changed:
                self._ahead = batch
                self._changed.notify_all()
        elif self._device.idle:
            self.wait()
        else:
            self._device.wait_until_idle(WAIT_S)

    def _wait_for_taker(self) -> None:
        """A batch is ahead. Where the device keeps it waiting, another worker may have it."""
        with self._changed:
            if self._changed.wait_for(lambda: self._ahead is None or self._stopping.is_set(), LOOK_EVERY_S):
                return
        if self._device.late:
            self.hand_back()


def hand_back(consumer: Consumer, heartbeat: Heartbeat, claimed: Sequence[Claimed], spared: bool = False) -> None:
    """Return jobs to the queue without counting an attempt; ``spared``: they were on a device that failed."""
    try:
        consumer.hand_back([(one.id, one.token) for one in claimed], spared=spared)
    except RedisError as error:
        log.warning("%d jobs wait for the end of their lease: %s", len(claimed), error)
    for one in claimed:
        heartbeat.let_go(one)


def read(claimed: Claimed, runtime: Runtime) -> Round | Failure:
    """What is to be drawn of the job, or why this runtime does not draw it."""
    try:
        found = round_of(Job.from_payload(claimed.payload), claimed.best)
        job = found.job
    except PayloadError as error:
        return Failure("generation_failed", f"The worker cannot run this job: {error}.")
    student = runtime.student
    if job.steps not in student.steps:
        return Failure("generation_failed", f"The worker's student was not trained for {job.steps} steps.")
    if not draws(runtime, student, (job.height, job.width)):
        return Failure("generation_failed", f"The worker's student cannot generate {job.width}x{job.height} pixels.")
    lengths = getattr(runtime, "lengths", {}).get((job.height, job.width))
    if (lengths is None) != (job.frames == 0) or (lengths and job.frames not in lengths):
        asked = f"videos of {job.frames} frames" if job.frames else "pictures"
        return Failure("generation_failed", f"The worker's student does not draw {asked} of this size.")
    return found


def _lane_of(claimed: Claimed) -> str:
    """Empty: the job cannot be read."""
    try:
        job = Job.from_payload(claimed.payload)
    except PayloadError:
        return ""
    return lane(job.model, job.version)
