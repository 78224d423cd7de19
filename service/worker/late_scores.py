"""Scores that come after the answer: of pictures whose job is done, by a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

from service.observe.logs import keeping_private
from service.quality.feedback import FeedbackPolicy
from service.queue.consumer import Consumer
from service.worker.backlog import Backlog
from service.worker.batch import Batch
from service.worker.execution import Drawn
from service.worker.heartbeat import Heartbeat
from service.worker.notes import Timing, notes_of
from service.worker.scoring import Judged, ScorePolicy, judge
from service.worker.settling import NO_FEEDBACK, until_answered

MOST_WAITING = 64  # batches

Guard = Callable[[str], AbstractContextManager[None]]

log = logging.getLogger(__name__)


class LateScores:
    """``guard(what)`` is entered around each call of the scorers. What waits is bounded: ``admits`` says no beyond."""

    def __init__(
        self, consumer: Consumer, heartbeat: Heartbeat, guard: Guard, policy: ScorePolicy,
        most_waiting: int = MOST_WAITING, feedback: FeedbackPolicy = NO_FEEDBACK,
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._guard = guard
        self._policy = policy
        self._feedback = feedback
        self._backlog = Backlog(most_batches=most_waiting)
        self._thread = ThreadPoolExecutor(1, "late-scores")

    def admits(self, calls: Sequence[Drawn]) -> bool:
        """Whether there is room for these pictures; then it is held until they are given to ``score``."""
        return self._backlog.offer(_bytes_of(calls))

    def score(self, batch: Batch, calls: Sequence[Drawn], numbers: Collection[int]) -> None:
        """Score the pictures of those jobs of a batch which are done; this returns at once."""
        scoring = self._thread.submit(self._score, batch, calls, numbers)
        scoring.add_done_callback(lambda _: self._backlog.remove(_bytes_of(calls)))

    def beside(self, action: Callable[[], None]) -> Future[None]:
        """Do something in the thread that scores."""
        return self._thread.submit(action)

    def wait_until_empty(self, patience_s: float | None = None) -> bool:
        """Return when all scores have come (True), or after ``patience_s`` (False)."""
        return self._backlog.wait_until_empty(patience_s)

    def _score(self, batch: Batch, calls: Sequence[Drawn], numbers: Collection[int]) -> None:
        try:
            scored = [self._judged(batch, call, numbers) for call in calls]
            for number in numbers:
                self._hand_in(batch, number, calls, scored)
        except Exception:  # the time for the scores runs out, and with it they count as lost
            log.exception("the scores of a batch cannot be handed in")
        finally:
            for number in numbers:
                self._heartbeat.let_go(batch.claimed[number])

    def _judged(self, batch: Batch, call: Drawn, numbers: Collection[int]) -> tuple[dict[int, list[Judged]], float]:
        """By the job's number: what is said of its pictures in this call; and how long that took, in seconds."""
        rows = [row for row, slot in enumerate(call.slots) if slot.job in numbers]
        if not rows:
            return {}, 0.0
        slots, started = [call.slots[row] for row in rows], time.perf_counter()
        prompts, seeds = [slot.prompt for slot in slots], [slot.seed for slot in slots]
        with self._guard("a scorer"), keeping_private(*prompts):
            judged = judge(batch.runtime, call.images_BCHW[rows], prompts, seeds, batch.jobs[0].steps, self._policy)
        found: dict[int, list[Judged]] = {}
        for slot, one in zip(slots, judged, strict=True):
            found.setdefault(slot.job, []).append(one)
        return found, time.perf_counter() - started

    def _hand_in(
        self, batch: Batch, number: int, calls: Sequence[Drawn], scored: Sequence[tuple[dict[int, list[Judged]], float]]
    ) -> None:
        claimed = batch.claimed[number]
        rode_in = [(found[number], score_s) for found, score_s in scored if number in found]
        judged = [one for found, _ in rode_in for one in found]
        scores = {"images": [one.record() for one in judged], "score_s": sum(score_s for _, score_s in rode_in)}
        timing = _timing(calls, number)
        notes = notes_of(batch.runtime.student, batch.jobs[number], judged, timing, self._feedback)
        until_answered(
            lambda: self._consumer.score(claimed.id, claimed.token, scores, notes),
            f"the scores of job {claimed.id} cannot be handed in yet",
        )


def _timing(calls: Sequence[Drawn], number: int) -> Timing:
    """Of the calls that a job rode in."""
    its = [call for call in calls if any(slot.job == number for slot in call.slots)]
    return Timing(sum(call.inference_s for call in its), max((len(call.slots) for call in its), default=0))


def _bytes_of(calls: Sequence[Drawn]) -> int:
    return sum(call.images_BCHW.nbytes for call in calls)
