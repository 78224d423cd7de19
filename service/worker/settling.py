"""One job's end: its pictures are encoded, signed and stored, and then the queue is told; or it has none, and why."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from redis.exceptions import RedisError

from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job
from service.queue.states import State
from service.results.store import ResultStore
from service.worker.batch import Maker
from service.worker.execution import Failure
from service.worker.heartbeat import Heartbeat
from service.worker.pictures import encode
from service.worker.provenance import Provenance
from service.worker.scoring import Judged
from service.worker.signing import ImageSigner, SigningError
from student.runtimes.runtime import FloatArray

PAUSE_AFTER_ERROR_S = 0.2
SETTLE_FOR_S = 60.0
STORE_PAUSES_S = (0.1, 0.4)  # a store that is away for a moment is tried again, then the job fails
DROPPED = Failure("generation_failed", "The job was dropped.")  # finish answers 'cancelled', 'expired' or 'fenced'
WITHOUT_PICTURES = ("fenced", State.FAILED, State.CANCELLED, State.EXPIRED)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """The pictures of one job, as arrays, and what they cost; batch mates share the times of their calls."""

    images: tuple[FloatArray, ...]
    judged: tuple[Judged, ...]
    batch_size: int
    queue_s: float
    inference_s: float
    score_s: float


class Settler:
    """Ends jobs; may be called from several threads. ``stopping`` cuts the pauses short."""

    def __init__(
        self, consumer: Consumer, store: ResultStore, heartbeat: Heartbeat, stopping: threading.Event,
        *, provenance: bool, signer: ImageSigner | None,
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self._store = store
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._provenance = provenance
        self._signer = signer

    def settle(
        self, maker: Maker, claimed: Claimed, job: Job, outcome: Drawing | Failure, calls: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store and announce the pictures of a job, or fail it; ``calls`` are the measured calls to report with it."""
        if self._heartbeat.dropped(claimed):
            outcome = DROPPED
        if isinstance(outcome, Failure):
            return self.fail(maker, claimed, outcome, calls)
        if not all(np.isfinite(image).all() for image in outcome.images):
            broken = Failure("generation_failed", "The picture came out broken (its values are not finite).")
            return self.fail(maker, claimed, broken, calls)
        started = time.perf_counter()
        try:
            images = self._keep_all(maker, claimed, job, outcome)
        except SigningError as error:
            log.error("job %s cannot be signed: %s", job.id, error)
            failure = Failure("generation_failed", "The picture could not be signed.")
            return self.fail(maker, claimed, failure, calls)
        except OSError as error:
            log.error("job %s cannot be stored: %s", job.id, error)
            failure = Failure("storage_failed", "The picture was drawn, but could not be stored.")
            return self.fail(maker, claimed, failure, calls)
        timings = {
            "queue_s": outcome.queue_s,
            "inference_s": outcome.inference_s,
            "score_s": outcome.score_s,
            "encode_s": time.perf_counter() - started,
        }
        result = {"images": images, "timings": timings, "batch_size": outcome.batch_size}
        # An unknown end (None) may be a good one: what it points at is left to the sweeper.
        if self._finish(maker, claimed, State.DONE, result, calls) in WITHOUT_PICTURES:
            self._discard(claimed)

    def fail(self, maker: Maker, claimed: Claimed, failure: Failure, calls: Sequence[Mapping[str, Any]] = ()) -> None:
        """End a job without pictures."""
        self._finish(maker, claimed, State.FAILED, {"error": asdict(failure)}, calls)
        self._discard(claimed)

    def show(self, maker: Maker, claimed: Claimed, job: Job, number: int, index: int, image_CHW: FloatArray) -> None:
        """Store look ``number`` at the unfinished image ``index``; a preview that cannot be had is left out."""
        try:
            data = encode(image_CHW, job.output_format, job.quality, self._made_by(maker))
            reference = self._store.put(job.id, claimed.token, f"p{number}-{index}", job.output_format, data)
            self._consumer.show(job.id, claimed.token, {f"{number}:{index}": reference})
        except (OSError, RedisError) as error:
            log.warning("a preview of job %s is left out: %s", job.id, error)

    def _keep_all(self, maker: Maker, claimed: Claimed, job: Job, drawing: Drawing) -> list[dict[str, Any]]:
        """Encode and store every picture of a job; a store that fails is tried a few times."""
        for pause_s in STORE_PAUSES_S:
            try:
                return [self._keep(maker, claimed, job, k, drawing) for k in range(len(drawing.images))]
            except OSError as error:
                log.warning("job %s cannot be stored yet: %s", job.id, error)
                self._stopping.wait(pause_s)
        return [self._keep(maker, claimed, job, k, drawing) for k in range(len(drawing.images))]

    def _keep(self, maker: Maker, claimed: Claimed, job: Job, index: int, drawing: Drawing) -> dict[str, Any]:
        """Encode and store one picture; returns what the client learns about it."""
        image_CHW = drawing.images[index]
        data = encode(image_CHW, job.output_format, job.quality, self._made_by(maker))
        if self._signer is not None:
            data = self._signer.sign(data, job.output_format, maker.origin)
        return {
            "file": self._store.put(job.id, claimed.token, str(index), job.output_format, data),
            "seed": job.seeds[index],
            "width": image_CHW.shape[2],
            "height": image_CHW.shape[1],
            "sha256": hashlib.sha256(data).hexdigest(),
            **drawing.judged[index].told(),
        }

    def _made_by(self, maker: Maker) -> Provenance | None:
        return maker.origin if self._provenance else None

    def _discard(self, claimed: Claimed) -> None:
        """Remove what a claim has stored; what cannot be removed now is swept away later."""
        try:
            self._store.discard(claimed.id, claimed.token)
        except OSError as error:
            log.warning("what job %s has stored is left to the sweeper: %s", claimed.id, error)

    def _finish(
        self,
        maker: Maker,
        claimed: Claimed,
        state: State,
        result: Mapping[str, Any],
        calls: Sequence[Mapping[str, Any]],
    ) -> str | None:
        """Tell the queue, through an outage of the server if need be; None if its answer stayed out."""
        report = {"runtime": maker.runtime, "calls": list(calls), **result}
        deadline = time.monotonic() + SETTLE_FOR_S
        try:
            while True:
                try:
                    ended = self._consumer.finish(claimed.id, claimed.token, state, report)
                except RedisError as error:
                    log.warning("job %s cannot be settled yet: %s", claimed.id, error)
                    if time.monotonic() > deadline:
                        return None  # another worker will draw it again
                    time.sleep(PAUSE_AFTER_ERROR_S)
                else:
                    about = {"job_id": claimed.id, "batch": claimed.token, "attempt": claimed.attempts, "state": ended}
                    log.info("job settled", extra=about)
                    return ended
        finally:
            self._heartbeat.let_go(claimed)
