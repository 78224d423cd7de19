"""The worker process: claim → draw → score → encode → store → settle, for one student."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from redis.exceptions import RedisError

from service.models.loaded import LoadedModels
from service.models.loader import open_models
from service.models.single import queue_name
from service.observe.logs import flush_logs, keeping_private
from service.observe.tracer import Tracing
from service.observe.tracing import open_tracing
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job, PayloadError, State
from service.results.choose import open_store
from service.results.store import ResultStore
from service.settings import Settings
from service.worker.accelerators import Accelerators
from service.worker.execution import Call, Drawing, Failure, execute
from service.worker.heartbeat import Heartbeat
from service.worker.pictures import encode
from service.worker.provenance import Provenance
from service.worker.signing import ImageSigner, SigningError, open_signer
from service.worker.step_callback import StepCallback
from student.runtimes.runtime import Runtime
from student.runtimes.sizes import own_size

WAIT_S = 1.0
PAUSE_AFTER_ERROR_S = 0.2
SETTLE_FOR_S = 60.0
STORE_PAUSES_S = (0.1, 0.4)  # a store that is away for a moment is asked again, then the job fails
STOP_MARGIN_S = 0.2  # whoever waits is told first

log = logging.getLogger(__name__)


class Worker:
    """Its runtimes, fed from the queue until ``stopping`` is set; an accepted batch is ended first."""

    def __init__(
        self, runtimes: Runtime | LoadedModels, consumer: Consumer, heartbeat: Heartbeat, store: ResultStore,
        stopping: threading.Event, *, provenance: bool = True, tracing: Tracing | None = None,
        signer: ImageSigner | None = None,
    ) -> None:  # fmt: skip
        self._loaded = runtimes if isinstance(runtimes, LoadedModels) else LoadedModels([runtimes])
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._store = store
        self._stopping = stopping
        self._provenance = provenance
        self._tracing = tracing or Tracing()
        self._signer = signer

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
        lanes = self._loaded.lanes
        if not lanes:
            self._stopping.wait(PAUSE_AFTER_ERROR_S)
        elif batch := self._consumer.claim_any({lane: runtime.max_batch for lane, runtime in lanes.items()}):
            self._take_up(batch, lanes)
            self._process(batch)
        else:
            self._consumer.wait(lanes, WAIT_S)

    def _take_up(self, batch: Sequence[Claimed], lanes: Mapping[str, Runtime]) -> None:
        """Draw with the runtime of the batch's lane from now on; whatever cannot be read is refused by any of them."""
        self._runtime = lanes.get(_lane_of(batch[0].payload) or "") or next(iter(lanes.values()))
        student = self._runtime.student
        self._origin = Provenance(student.id, student.version)
        self._made_by = self._origin if self._provenance else None

    def _process(self, batch: Sequence[Claimed]) -> None:
        with self._heartbeat.holding(batch):
            jobs: list[tuple[Claimed, Job]] = []
            for claimed in batch:
                accepted = self._reject(claimed)
                if isinstance(accepted, Job):
                    jobs.append((claimed, accepted))
                else:
                    self._settle_failure(claimed, accepted, ())
            if jobs:
                with keeping_private(*(job.prompt for _, job in jobs)):
                    self._draw(jobs)

    def _draw(self, jobs: Sequence[tuple[Claimed, Job]]) -> None:
        """Draw the jobs of a batch and settle each."""
        batch, asked = jobs[0][0].token, [job for _, job in jobs]
        with self._tracing.batch(batch, asked):
            with self._tracing.stage("draw"):
                executed = execute(self._runtime, asked, self._steps(jobs))
            drawn = [job for job, end in zip(asked, executed.outcomes, strict=True) if isinstance(end, Drawing)]
            about = {
                "batch": batch,
                "job_ids": [job.id for job in drawn],
                "request_ids": [job.request_id for job in drawn],
                "images": [call.images for call in executed.calls],
                "inference_s": round(sum(call.inference_s for call in executed.calls), 4),
            }
            log.info("drew %d of %d jobs", len(drawn), len(jobs), extra=about)
            calls = executed.calls  # measured once, so told once: with the first job
            with self._tracing.stage("settle"):
                for (claimed, job), outcome in zip(jobs, executed.outcomes, strict=True):
                    self._settle(claimed, job, outcome, calls)
                    calls = ()

    def _steps(self, jobs: Sequence[tuple[Claimed, Job]]) -> StepCallback:
        def settle(claimed: Claimed) -> None:
            self._settle_failure(claimed, Failure("generation_failed", "The job was dropped."), ())

        return StepCallback(jobs, self._heartbeat, self._consumer, self._store, self._made_by, settle)

    def _reject(self, claimed: Claimed) -> Job | Failure:
        """The job, or why it is not to be drawn."""
        try:
            job = Job.from_payload(claimed.payload)
        except PayloadError as error:
            return Failure("generation_failed", f"The worker cannot take this job: {error}.")
        student = self._runtime.student
        if job.steps not in student.steps:
            return Failure("generation_failed", f"The worker's student was not trained for {job.steps} steps.")
        if (job.height, job.width) not in getattr(self._runtime, "sizes", [own_size(student)]):
            return Failure("generation_failed", f"The worker's student does not draw {job.width}x{job.height} pixels.")
        return job

    def _settle(self, claimed: Claimed, job: Job, outcome: Drawing | Failure, calls: Sequence[Call]) -> None:
        if self._heartbeat.dropped(job.id):
            outcome = Failure("generation_failed", "The job was dropped.")  # finish answers why
        if isinstance(outcome, Failure):
            return self._settle_failure(claimed, outcome, calls)
        started = time.perf_counter()
        try:
            images = self._keep_all(claimed, job, outcome)
        except SigningError as error:
            log.error("job %s cannot be signed: %s", job.id, error)
            failure = Failure("generation_failed", "The picture could not be signed.")
            return self._settle_failure(claimed, failure, calls)
        except OSError as error:
            log.error("job %s cannot be stored: %s", job.id, error)
            failure = Failure("storage_failed", "The picture was drawn, but could not be stored.")
            return self._settle_failure(claimed, failure, calls)
        timings = {
            "queue_s": claimed.queue_s,
            "inference_s": outcome.inference_s,
            "score_s": outcome.score_s,
            "encode_s": time.perf_counter() - started,
        }
        result = {"images": images, "timings": timings, "batch_size": outcome.batch_size}
        if self._finish(claimed, State.DONE, result, calls) != State.DONE:
            self._discard(claimed)

    def _keep_all(self, claimed: Claimed, job: Job, drawing: Drawing) -> list[dict[str, Any]]:
        """Encode and store every picture of a job; a store that fails is asked a few times."""
        for pause_s in STORE_PAUSES_S:
            try:
                return [self._keep(claimed, job, k, drawing) for k in range(len(drawing.images))]
            except OSError as error:
                log.warning("job %s cannot be stored yet: %s", job.id, error)
                self._stopping.wait(pause_s)
        return [self._keep(claimed, job, k, drawing) for k in range(len(drawing.images))]

    def _keep(self, claimed: Claimed, job: Job, index: int, drawing: Drawing) -> dict[str, Any]:
        """Encode and store one picture; returns what the client is told about it."""
        image_CHW = drawing.images[index]
        data = encode(image_CHW, job.output_format, job.quality, self._made_by)
        if self._signer is not None:
            data = self._signer.sign(data, job.output_format, self._origin)
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
        self._discard(claimed)

    def _discard(self, claimed: Claimed) -> None:
        """Remove what a claim has stored; what cannot be removed now is swept away later."""
        try:
            self._store.discard(claimed.id, claimed.token)
        except OSError as error:
            log.warning("what job %s has stored is left to the sweeper: %s", claimed.id, error)

    def _finish(self, claimed: Claimed, state: State, result: dict[str, Any], calls: Sequence[Call]) -> str | None:
        """Tell the queue, through an outage of the server if need be; None if that was in vain."""
        told = {"runtime": self._runtime.name, "calls": [asdict(call) for call in calls], **result}
        deadline = time.monotonic() + SETTLE_FOR_S
        while True:
            try:
                ended = self._consumer.finish(claimed.id, claimed.token, state, told)
                about = {"job_id": claimed.id, "batch": claimed.token, "attempt": claimed.attempts, "state": ended}
                log.info("job settled", extra=about)
                return ended
            except RedisError as error:
                log.warning("job %s cannot be settled yet: %s", claimed.id, error)
                if self._stopping.wait(PAUSE_AFTER_ERROR_S) or time.monotonic() > deadline:
                    return None  # another worker will draw it again


def _lane_of(payload: str) -> str | None:
    try:
        return Job.from_payload(payload).lane
    except PayloadError:
        return None


def run_worker(settings: Settings, name: str) -> None:
    """Load the student, or those of FEWSTEP_MODELS that are wanted, and work until SIGTERM or SIGINT.

    Raises:
        StartupError: the student cannot be served, or no server is known.
    """
    stopping = threading.Event()
    tracing, signer = open_tracing(settings, "worker"), open_signer(settings)
    queue = queue_name(settings)
    loaded = open_models(settings, stopping)
    heartbeat = Heartbeat(_consumer(settings, queue, name), loaded.info, settings.lease_s / 3, Accelerators())
    leaver = _consumer(settings, queue, name)
    _stop_on_signal(stopping, heartbeat, leaver, settings.grace_s + STOP_MARGIN_S)
    with heartbeat:
        Worker(
            loaded, _consumer(settings, queue, name), heartbeat, open_store(settings), stopping,
            provenance=settings.provenance, tracing=tracing, signer=signer,
        ).run()  # fmt: skip
    leaver.release([])
    tracing.close()
    log.info("stopped", extra={"handed_back": 0})


def _consumer(settings: Settings, queue: str, name: str) -> Consumer:
    client = connect(settings.required_redis_url, block_s=WAIT_S)
    return Consumer(client, queue, name, lease_s=settings.lease_s, max_attempts=settings.max_attempts)


def _stop_on_signal(stopping: threading.Event, heartbeat: Heartbeat, leaver: Consumer, grace_s: float) -> None:
    """On a signal: end the batch; if that takes longer than ``grace_s``, hand it back and go."""

    def leave() -> None:
        try:
            log.info("stopped", extra={"handed_back": leaver.release(heartbeat.held())})
        finally:
            flush_logs()
            os._exit(0)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not stopping.is_set():
            stopping.set()
            patience = threading.Timer(grace_s, leave)
            patience.daemon = True
            patience.start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
