"""The end of one job: its images are encoded, signed and stored before the queue ends it; or it fails with a reason."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from redis.exceptions import RedisError

from service.quality.feedback import FeedbackPolicy
from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job
from service.queue.rounds import Round
from service.queue.states import State
from service.results.store import ResultStore
from service.worker.batch import Maker
from service.worker.execution import Failure
from service.worker.files import PictureFiles, StoredFile, time_of
from service.worker.floor import Floor, Load
from service.worker.heartbeat import Heartbeat
from service.worker.notes import Timing, notes_of
from service.worker.scoring import Judged
from service.worker.selection import Kept, select, with_earlier, with_floor
from service.worker.signing import ImageSigner, SigningError
from student.runtimes.runtime import FloatArray

PAUSE_AFTER_ERROR_S = 0.2
SETTLE_FOR_S = 60.0
STORE_PAUSES_S = (0.1, 0.4)  # a store that is away for a moment is tried again, then the job fails
Scoring = Literal["", "pending", "skipped"]  # scores come with the pictures; later; or, as too many wait, not at all
DROPPED = Failure("generation_failed", "The job was dropped.")  # finish answers 'cancelled', 'expired' or 'fenced'
NO_FEEDBACK = FeedbackPolicy()
WITHOUT_PICTURES = ("fenced", State.FAILED, State.CANCELLED, State.EXPIRED)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """The pictures of one round of a job (CHW; videos FCHW), and what they cost; batch mates share the times of their
    calls. ``ahead`` are the files of those, by row, that are being stored while they are scored."""

    images: tuple[FloatArray, ...]
    judged: tuple[Judged, ...]
    batch_size: int
    queue_s: float
    inference_s: float
    score_s: float
    scoring: Scoring = ""
    floor: Floor | None = None
    ahead: Mapping[int, Future[StoredFile]] = field(default_factory=dict)


class Settler:
    """Ends jobs; may be called from several threads. ``stopping`` cuts the pauses short."""

    def __init__(
        self, consumer: Consumer, store: ResultStore, heartbeat: Heartbeat, stopping: threading.Event,
        *, provenance: bool, signer: ImageSigner | None, feedback: FeedbackPolicy = NO_FEEDBACK,
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self.files = PictureFiles(store, provenance=provenance, signer=signer)
        self._heartbeat = heartbeat
        self._stopping = stopping
        self._feedback = feedback

    def settle(
        self, maker: Maker, claimed: Claimed, drawn: Round, outcome: Drawing | Failure,
        calls: Sequence[Mapping[str, Any]],
    ) -> bool:  # fmt: skip
        """Store and announce what a round of a job has given, or fail it; ``calls`` are the measured ones to report.

        Returns whether scores are awaited for it now: then the heartbeat still holds it.
        """
        if self.unwanted(claimed):
            outcome = DROPPED
        stored = outcome if isinstance(outcome, Failure) else self._stored(maker, claimed, drawn, outcome)
        if isinstance(stored, Failure):
            self.fail(maker, claimed, stored, calls)
            return False
        result, following = stored
        report = {"runtime": maker.runtime, **result, "calls": [*drawn.best.get("calls", []), *calls]}
        follow = result["scoring"] == "pending"
        if following is not None:
            ended = self._advance(claimed, following, report)
        else:
            notes = {} if follow else self._notes(maker, drawn.asked, result)
            ended = self._finish(claimed, State.DONE, report, scores_follow=follow, notes=notes)
        self._discard_unless_done(claimed, ended)
        return follow and ended == State.DONE

    def _discard_unless_done(self, claimed: Claimed, ended: str | None) -> None:
        """Remove a job's files; not where its end is unknown (None), which may be a good one: the sweeper has them."""
        if ended in WITHOUT_PICTURES:
            self.files.discard(claimed)

    def unwanted(self, claimed: Claimed) -> bool:
        """Whether a job need not be continued: it was cancelled, has expired, or is another worker's by now."""
        return self._heartbeat.dropped(claimed) is not None

    def _notes(self, maker: Maker, job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be counted with the job's end, of the pictures that it ends with."""
        judged = [Judged(one["reward"], one["reward_percentile"]) for one in result["images"]]
        timing = Timing(result["timings"]["inference_s"], result["batch_size"])
        return notes_of(maker.student, job, judged, timing, self._feedback)

    def _stored(
        self, maker: Maker, claimed: Claimed, drawn: Round, drawing: Drawing
    ) -> tuple[dict[str, Any], Round | None] | Failure:
        """The job's result once the images that are kept are stored, and the round that follows; or why it failed."""
        kept = select(drawn, drawing.judged, [bool(np.isfinite(image).all()) for image in drawing.images])
        pictures = [one for one in kept if one is not None]
        if len(pictures) < len(kept):
            return Failure("generation_failed", "The generated image is broken (its values are not finite).")
        floor, following = self._judged_by_floor(claimed, drawn, pictures, drawing.floor)
        try:
            files = self._keep_all(maker, claimed, drawn, drawing, pictures)
        except SigningError as error:
            log.error("job %s cannot be signed: %s", claimed.id, error)
            return Failure("generation_failed", "The image could not be signed.")
        except OSError as error:
            log.error("job %s cannot be stored: %s", claimed.id, error)
            return Failure("storage_failed", "The image was generated, but could not be stored.")
        timings = {
            "queue_s": drawing.queue_s,
            "inference_s": drawing.inference_s,
            "score_s": drawing.score_s,
            "encode_s": time_of(files),
        }
        images = [self._about(drawn, index, drawing, one, files[index]) for index, one in enumerate(pictures)]
        result = {"images": images, "timings": timings, "batch_size": drawing.batch_size, "scoring": drawing.scoring}
        result = with_earlier(drawn, result)
        return (result if floor is None else with_floor(drawn, result, pictures, floor)), following

    def _judged_by_floor(
        self, claimed: Claimed, drawn: Round, kept: Sequence[Kept], floor: Floor | None
    ) -> tuple[Floor | None, Round | None]:
        """The floor in effect, and the round that follows; the queue is only asked where one might."""
        if floor is None:
            return None, None
        following = drawn.following([image for image, one in enumerate(kept) if floor.sends_on(one.score)])
        if following is None:
            return floor, None
        load = self._load(claimed, following)
        floor = floor.under(load, drawn.asked)
        going = [] if load.late else [image for image, one in enumerate(kept) if floor.sends_on(one.score)]
        return floor, drawn.following(going)

    def _load(self, claimed: Claimed, following: Round) -> Load:
        try:
            return Load(*self._consumer.load(claimed.id, following.job.cost))
        except RedisError as error:
            log.warning("the load is unknown, and the floor of job %s stays: %s", claimed.id, error)
            return Load(0.0, False)

    def fail(self, maker: Maker, claimed: Claimed, failure: Failure, calls: Sequence[Mapping[str, Any]] = ()) -> None:
        """End a job without pictures; if it has ended with them, although nobody was told, they stay."""
        report = {"runtime": maker.runtime, "calls": list(calls), "error": asdict(failure)}
        self._discard_unless_done(claimed, self._finish(claimed, State.FAILED, report))

    def show(self, maker: Maker, claimed: Claimed, job: Job, number: int, index: int, image_CHW: FloatArray) -> None:
        """Store preview ``number`` of the unfinished image ``index``; one that fails is left out."""
        try:
            reference = self.files.store_preview(maker, claimed, job, number, index, image_CHW)
            self._consumer.show(job.id, claimed.token, {f"{number}:{index}": reference})
        except (OSError, RedisError) as error:
            log.warning("a preview of job %s is left out: %s", job.id, error)

    def advance(self, claimed: Claimed, steps_done: int) -> None:
        """Tell how far a job is; a report that does not arrive is left out."""
        try:
            self._consumer.progress(claimed.id, claimed.token, steps_done)
        except RedisError as error:
            log.warning("the progress of job %s cannot be reported: %s", claimed.id, error)

    def _keep_all(
        self, maker: Maker, claimed: Claimed, drawn: Round, drawing: Drawing, kept: Sequence[Kept]
    ) -> list[StoredFile | None]:
        """The files of the kept pictures that are new; a store that fails is tried a few times."""

        def all_of_them() -> list[StoredFile | None]:
            return [self._keep(maker, claimed, drawn.asked, k, drawing, one) for k, one in enumerate(kept)]

        for pause_s in STORE_PAUSES_S:
            try:
                return all_of_them()
            except OSError as error:
                log.warning("job %s cannot be stored yet: %s", claimed.id, error)
                self._stopping.wait(pause_s)
        return all_of_them()

    def _keep(
        self, maker: Maker, claimed: Claimed, job: Job, index: int, drawing: Drawing, kept: Kept
    ) -> StoredFile | None:
        """The file of one picture, which may be there already; None for one of an earlier round or a canary's pair,
        which is sent to nobody."""
        if kept.row is None or job.pair:
            return None
        ahead = drawing.ahead.get(kept.row)
        if ahead is not None and ahead.exception() is None:
            return ahead.result()
        return self.files.store(maker, claimed, job, index, drawing.images[kept.row])

    def _about(self, drawn: Round, index: int, drawing: Drawing, kept: Kept, file: StoredFile | None) -> dict[str, Any]:
        """What the client learns about a kept picture."""
        if kept.row is None:
            return {**drawn.best["images"][index], **kept.about}
        image = drawing.images[kept.row]
        about = {"width": image.shape[-1], "height": image.shape[-2], **kept.about}
        if image.ndim == 4:
            about = {"num_frames": len(image), "fps": drawn.asked.fps, **about}
        return {**(file.record() if file else {}), **about}

    def _finish(
        self,
        claimed: Claimed,
        state: State,
        report: Mapping[str, Any],
        *,
        scores_follow: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> str | None:
        """End the job in the queue, retrying through an outage of the server; None if it never answered."""
        ended: str | None = None
        try:
            ended = until_answered(
                lambda: self._consumer.finish(
                    claimed.id, claimed.token, state, report, scores_follow=scores_follow, notes=notes
                ),
                f"job {claimed.id} cannot be settled yet",
            )  # without an answer another worker will draw it again
        finally:
            if not (scores_follow and ended == State.DONE):
                self._heartbeat.let_go(claimed)
        return _noted(claimed, ended)

    def _advance(self, claimed: Claimed, following: Round, report: Mapping[str, Any]) -> str | None:
        """The same for a job that continues with another round."""
        going, best = following.job, {**report, **following.noted()}
        try:
            state = until_answered(
                lambda: self._consumer.advance(
                    claimed.id, claimed.token, best, shape=going.shape, images=going.images, cost=going.cost
                ),
                f"job {claimed.id} cannot continue yet",
            )
        finally:
            self._heartbeat.let_go(claimed)
        return _noted(claimed, state)


def _noted(claimed: Claimed, state: str | None) -> str | None:
    if state is not None:
        about = {"job_id": claimed.id, "batch": claimed.token, "attempt": claimed.attempts, "state": state}
        log.info("job settled", extra=about)
    return state


def until_answered(call: Callable[[], T], trouble: str) -> T | None:
    """What the queue's server answers, through an outage of ``SETTLE_FOR_S``; None if the answer stayed out."""
    deadline = time.monotonic() + SETTLE_FOR_S
    while True:
        try:
            return call()
        except RedisError as error:
            log.warning("%s: %s", trouble, error)
            if time.monotonic() > deadline:
                return None
            time.sleep(PAUSE_AFTER_ERROR_S)
