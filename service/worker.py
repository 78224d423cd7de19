"""The worker process: claim → draw → score → encode → store → settle, for one student."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from redis.exceptions import RedisError

from service.execution import Call, Drawing, Failure, execute
from service.heartbeat import Heartbeat
from service.model import open_runtime
from service.pictures import encode
from service.provenance import Provenance
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job, PayloadError, State, lane
from service.results import ResultStore
from service.settings import Settings
from service.signing import Seal, SigningError, open_seal
from service.steps import Steps
from student.runtimes.runtime import Runtime, StepwiseRuntime

WAIT_S = 1.0
PAUSE_AFTER_ERROR_S = 0.2
SETTLE_FOR_S = 60.0
STOP_GRACE_S = 1.2

log = logging.getLogger(__name__)


class Worker:
    """One runtime, fed from the queue until ``stopping`` is set; an accepted batch is ended first."""

    def __init__(
        self, runtime: Runtime, consumer: Consumer, heartbeat: Heartbeat, store: ResultStore, stopping: threading.Event,
        *, provenance: bool = True, seal: Seal | None = None,
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._store = store
        self._stopping = stopping
        self._origin = Provenance(runtime.student.id, runtime.student.version)
        self._made_by = self._origin if provenance else None
        self._seal = seal
        self._lane = lane(runtime.student.id, runtime.student.version)

    def run(self) -> None:
        """Work until told to stop; a server that is away for a while is waited for."""
        while not self._stopping.is_set():
            try:
                self.step()
            except RedisError as error:
                log.warning("the queue is out of reach: %s", error)
                self._stopping.wait(PAUSE_AFTER_ERROR_S)

    def step(self) -> None:
        """Draw what waits, as one batch; if nothing does, wait a moment for it."""
        if batch := self._consumer.claim(self._lane, self._runtime.max_batch):
            self._process(batch)
        else:
            self._consumer.wait(self._lane, WAIT_S)

    def _process(self, batch: Sequence[Claimed]) -> None:
        with self._heartbeat.holding(batch):
            jobs: list[tuple[Claimed, Job]] = []
            for claimed in batch:
                accepted = self._reject(claimed)
                if isinstance(accepted, Job):
                    jobs.append((claimed, accepted))
                else:
                    self._settle_failure(claimed, accepted, ())
            executed = execute(self._runtime, [job for _, job in jobs], self._steps(jobs))
            calls = executed.calls  # measured once, so told once: with the first job
            for (claimed, job), outcome in zip(jobs, executed.outcomes, strict=True):
                self._settle(claimed, job, outcome, calls)
                calls = ()
        drawn = sum(isinstance(outcome, Drawing) for outcome in executed.outcomes)
        log.info(
            "drew %d of %d jobs in calls of %s images", drawn, len(batch), [call.images for call in executed.calls]
        )

    def _steps(self, jobs: Sequence[tuple[Claimed, Job]]) -> Steps:
        def settle(claimed: Claimed) -> None:
            self._settle_failure(claimed, Failure("generation_failed", "The job was dropped."), ())

        return Steps(jobs, self._heartbeat, self._consumer, self._store, self._made_by, settle)

    def _reject(self, claimed: Claimed) -> Job | Failure:
        """The job, or why it is not to be drawn."""
        try:
            job = Job.from_payload(claimed.payload)
        except PayloadError as error:
            return Failure("generation_failed", f"The worker cannot take this job: {error}.")
        student = self._runtime.student
        if job.steps not in student.steps:
            return Failure("generation_failed", f"The worker's student was not trained for {job.steps} steps.")
        if (job.height, job.width) != (student.image.height, student.image.width):
            return Failure("generation_failed", f"The worker's student does not draw {job.width}x{job.height} pixels.")
        return job

    def _settle(self, claimed: Claimed, job: Job, outcome: Drawing | Failure, calls: Sequence[Call]) -> None:
        if self._heartbeat.dropped(job.id):
            outcome = Failure("generation_failed", "The job was dropped.")  # finish answers why
        if isinstance(outcome, Failure):
            return self._settle_failure(claimed, outcome, calls)
        started = time.perf_counter()
        try:
            images = [self._keep(claimed, job, k, outcome) for k in range(len(outcome.images))]
        except (OSError, SigningError) as error:
            done = "signed" if isinstance(error, SigningError) else "stored"
            log.error("job %s cannot be %s: %s", job.id, done, error)
            return self._settle_failure(
                claimed, Failure("generation_failed", f"The picture could not be {done}."), calls
            )
        timings = {
            "queue_s": claimed.queue_s,
            "inference_s": outcome.inference_s,
            "score_s": outcome.score_s,
            "encode_s": time.perf_counter() - started,
        }
        result = {"images": images, "timings": timings, "batch_size": outcome.batch_size}
        if self._finish(claimed, State.DONE, result, calls) != State.DONE:
            self._store.discard(claimed.id, claimed.token)

    def _keep(self, claimed: Claimed, job: Job, index: int, drawing: Drawing) -> dict[str, Any]:
        """Encode and store one picture; returns what the client is told about it."""
        image_CHW = drawing.images[index]
        data = encode(image_CHW, job.output_format, job.quality, self._made_by)
        if self._seal is not None:
            data = self._seal.sign(data, job.output_format, self._origin)
        return {
            "file": self._store.put(job.id, claimed.token, str(index), job.output_format, data),
            "seed": job.seeds[index],
            "width": image_CHW.shape[2],
            "height": image_CHW.shape[1],
            "sha256": hashlib.sha256(data).hexdigest(),
            "reward": drawing.rewards[index],
        }

    def _settle_failure(self, claimed: Claimed, failure: Failure, calls: Sequence[Call]) -> None:
        self._finish(claimed, State.FAILED, {"error": asdict(failure)}, calls)
        self._store.discard(claimed.id, claimed.token)

    def _finish(self, claimed: Claimed, state: State, result: dict[str, Any], calls: Sequence[Call]) -> str | None:
        """Tell the queue, through an outage of the server if need be; None if that was in vain."""
        told = {"runtime": self._runtime.name, "calls": [asdict(call) for call in calls], **result}
        deadline = time.monotonic() + SETTLE_FOR_S
        while True:
            try:
                return self._consumer.finish(claimed.id, claimed.token, state, told)
            except RedisError as error:
                log.warning("job %s cannot be settled yet: %s", claimed.id, error)
                if self._stopping.wait(PAUSE_AFTER_ERROR_S) or time.monotonic() > deadline:
                    return None  # another worker will draw it again


def run_worker(settings: Settings, name: str) -> None:
    """Load the student and work until SIGTERM or SIGINT.

    Raises:
        StartupError: the student cannot be served, or no server is known.
    """
    stopping = threading.Event()
    seal = open_seal(settings)
    runtime = open_runtime(settings)
    heartbeat = Heartbeat(_consumer(settings, runtime, name), _info(runtime), settings.lease_s / 3)
    leaver = _consumer(settings, runtime, name)
    _stop_on_signal(stopping, heartbeat, leaver)
    with heartbeat:
        store = ResultStore(settings.results_dir)
        Worker(
            runtime,
            _consumer(settings, runtime, name),
            heartbeat,
            store,
            stopping,
            provenance=settings.provenance,
            seal=seal,
        ).run()
    leaver.release([])


def _consumer(settings: Settings, runtime: Runtime, name: str) -> Consumer:
    client = connect(settings.required_redis_url, block_s=WAIT_S)
    return Consumer(client, runtime.student.id, name, lease_s=settings.lease_s, max_attempts=settings.max_attempts)


def _info(runtime: Runtime) -> dict[str, Any]:
    return {
        "runtime": runtime.name,
        "host": socket.gethostname(),
        "max_batch": runtime.max_batch,
        "shows_steps": isinstance(runtime, StepwiseRuntime),
    }


def _stop_on_signal(stopping: threading.Event, heartbeat: Heartbeat, leaver: Consumer) -> None:
    """On a signal: end the batch; if that takes too long, hand it back and go."""

    def leave() -> None:
        try:
            leaver.release(heartbeat.held())
        finally:
            os._exit(0)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not stopping.is_set():
            stopping.set()
            patience = threading.Timer(STOP_GRACE_S, leave)
            patience.daemon = True
            patience.start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
