"""What becomes of drawn batches: scored, encoded and settled by other threads while the next one is drawn."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.observe.logs import keeping_private
from service.observe.tracer import BatchTrace
from service.queue.job import Claimed
from service.worker.backlog import Backlog
from service.worker.batch import Batch, Maker
from service.worker.batching import largest_call
from service.worker.execution import Drawn, Executed, Failure, drawn_of
from service.worker.files import StoredFile
from service.worker.floor import floor_of
from service.worker.late_scores import Guard, LateScores
from service.worker.scoring import Judged, ScorePolicy, judge
from service.worker.settling import DROPPED, Drawing, Scoring, Settler
from student.runtimes.runtime import FloatArray

MOST_ENCODERS = 4
NOTHING: Mapping[int, Future[StoredFile]] = {}
UNDELIVERED = Failure("generation_failed", "The image was generated, but could not be delivered.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A call of the runtime, and what is said of its rows."""

    call: Drawn
    judged: tuple[Judged, ...]
    score_s: float


class Finisher:
    """A thread that scores, and a few that encode and settle; ``submit`` waits while too much is unfinished.

    ``guard(what)`` is entered around each call of the scorers.
    """

    def __init__(self, settler: Settler, late: LateScores, guard: Guard, policy: ScorePolicy) -> None:
        self._settler = settler
        self._late = late
        self._guard = guard
        self._policy = policy
        self._backlog = Backlog()
        self._scoring = ThreadPoolExecutor(1, "score")
        self._settling = ThreadPoolExecutor(min(MOST_ENCODERS, os.cpu_count() or 1), "settle")
        self._showing = ThreadPoolExecutor(1, "previews")  # one thread keeps the previews of a job in order
        # previews, reports and files of a job that its end waits for
        self._unfinished: dict[tuple[str, int], list[Future[Any]]] = defaultdict(list)

    def submit(
        self, batch: Batch, executed: Executed, started_at: float, trace: BatchTrace, ended: Collection[int] = ()
    ) -> None:
        """Finish what was drawn of a batch; ``started_at`` is when the device began (``time.monotonic``).

        ``ended`` are the jobs that were given up meanwhile: they are not ended a second time.
        """
        num_bytes = sum(call.images_BCHW.nbytes for call in executed.calls)
        self._backlog.add(num_bytes)

        settled = trace.begin("settle")

        def done() -> None:
            settled()
            trace.end()
            self._backlog.remove(num_bytes)

        numbers = [n for n in range(len(batch.jobs)) if n not in executed.undrawn and n not in ended]
        if self._policy.after and batch.runtime.student.scorers and not batch.chooses:
            self._settle_unscored(batch, executed, started_at, numbers, done)
        else:
            self._scoring.submit(self._finish, batch, executed, started_at, trace, numbers, done)

    def refuse(self, maker: Maker, claimed: Claimed, failure: Failure) -> None:
        """End a job that was claimed and is not to be drawn."""
        self._backlog.add(0, wait=False)
        ending = self._settling.submit(self._settler.fail, maker, claimed, failure)
        ending.add_done_callback(lambda _: self._backlog.remove(0))

    def give_up(self, batch: Batch, number: int) -> None:
        """End a job that nobody wants any more, before its mates are drawn."""
        self._backlog.add(0, wait=False)
        ending = self._settling.submit(self._give_up, batch, number)
        ending.add_done_callback(lambda _: self._backlog.remove(0))

    def show(self, batch: Batch, number: int, preview: int, index: int, image_CHW: FloatArray) -> None:
        """Show a preview of a job's image; it is there before the job has ended."""
        claimed, job = batch.claimed[number], batch.jobs[number]
        shown = self._showing.submit(self._settler.show, batch.maker, claimed, job, preview, index, image_CHW)
        self._unfinished[batch.token, number].append(shown)

    def advance(self, batch: Batch, number: int, steps_done: int) -> None:
        """Tell how many of a job's steps are done."""
        reported = self._showing.submit(self._settler.advance, batch.claimed[number], steps_done)
        self._unfinished[batch.token, number].append(reported)

    def beside(self, action: Callable[[], None]) -> None:
        """Do something in the thread that scores, since a scorer need not bear two callers."""

        def guarded() -> None:
            try:
                with self._guard("a scorer"):
                    action()
            except Exception:
                log.exception("a probe cannot be judged")

        self._backlog.add(0, wait=False)
        scoring = self._late.beside(guarded) if self._policy.after else self._scoring.submit(guarded)
        scoring.add_done_callback(lambda _: self._backlog.remove(0))

    def drain(self, patience_s: float | None = None) -> bool:
        """Return when everything is settled and scored (True), or after ``patience_s`` (False)."""
        end = None if patience_s is None else time.monotonic() + patience_s
        settled = self._backlog.wait_until_empty(patience_s)
        return self._late.wait_until_empty(end and max(0.0, end - time.monotonic())) and settled

    def _finish(
        self, batch: Batch, executed: Executed, started_at: float, trace: BatchTrace, numbers: Sequence[int],
        done: Callable[[], None],
    ) -> None:  # fmt: skip
        """Score a batch, then have its jobs settled side by side."""
        judged = trace.begin("score")
        ahead = {number: self._store_ahead(batch, executed, number) for number in numbers}
        try:
            scored = [self._scored(batch, call) for call in executed.calls]
            outcomes = {n: _outcome(batch, n, executed, scored, started_at, ahead=ahead[n]) for n in numbers}
        except Exception:
            log.exception("a batch cannot be finished")
            outcomes = dict.fromkeys(numbers, UNDELIVERED)
        judged()
        when_all(list(self._settle_all(batch, executed, outcomes).values()), done)

    def _settle_unscored(
        self, batch: Batch, executed: Executed, started_at: float, numbers: Sequence[int], done: Callable[[], None]
    ) -> None:
        """Have the jobs settled at once, and what has become of them scored afterwards, if there is room for it."""
        calls = executed.calls
        later = self._late.admits(calls)
        scored = [Scored(call, (Judged(),) * len(call.slots), 0.0) for call in calls]
        scoring: Scoring = "pending" if later else "skipped"
        outcomes = {n: _outcome(batch, n, executed, scored, started_at, scoring) for n in numbers}
        settling = self._settle_all(batch, executed, outcomes)

        def then() -> None:
            done()
            if later:
                self._late.score(batch, calls, [n for n, ending in settling.items() if ending.result()])

        when_all(list(settling.values()), then)

    def _settle_all(
        self, batch: Batch, executed: Executed, outcomes: Mapping[int, Drawing | Failure]
    ) -> dict[int, Future[bool]]:
        """By the job's number, whether its scores are awaited; the calls, measured once, go with the first."""
        reports = {number: _reports(executed) for number in list(outcomes)[:1]}
        return {
            number: self._settling.submit(self._settle, batch, number, outcome, reports.get(number, ()))
            for number, outcome in outcomes.items()
        }

    def _scored(self, batch: Batch, call: Drawn) -> Scored:
        started = time.perf_counter()
        with self._guard("a scorer"), keeping_private(*batch.prompts):
            prompts, seeds = zip(*[(slot.prompt, slot.seed) for slot in call.slots], strict=True)
            always = [row for row, slot in enumerate(call.slots) if batch.rounds[slot.job].asked.rank_by]
            judged = judge(batch.runtime, call.images_BCHW, prompts, seeds, batch.jobs[0].steps, self._policy, always)
        return Scored(call, judged, time.perf_counter() - started)

    def _store_ahead(self, batch: Batch, executed: Executed, number: int) -> dict[int, Future[StoredFile]]:
        """Where no score decides which pictures of a job are kept, they are stored while they are scored."""
        claimed, job = batch.claimed[number], batch.rounds[number].asked
        if number in executed.failures or job.rank_by or job.pair or self._settler.unwanted(claimed):
            return {}
        rows = [call.images_BCHW[row] for call, row in drawn_of(executed, number)]
        ahead = {
            index: self._settling.submit(self._settler.files.store, batch.maker, claimed, job, index, image)
            for index, image in enumerate(rows)
            if np.isfinite(image).all()
        }
        self._unfinished[batch.token, number].extend(ahead.values())
        return ahead

    def _give_up(self, batch: Batch, number: int) -> None:
        self._wait_for_files(batch, number)  # one that is still being written would outlive what is removed here
        self._settler.fail(batch.maker, batch.claimed[number], DROPPED)

    def _wait_for_files(self, batch: Batch, number: int) -> None:
        wait(self._unfinished.pop((batch.token, number), ()))

    def _settle(self, batch: Batch, number: int, outcome: Drawing | Failure, calls: Sequence[dict[str, Any]]) -> bool:
        self._wait_for_files(batch, number)
        claimed, drawn = batch.claimed[number], batch.rounds[number]
        with keeping_private(drawn.asked.prompt):
            try:
                return self._settler.settle(batch.maker, claimed, drawn, outcome, calls)
            except Exception:  # whatever it is: a job that nobody ends would run until its lease does
                log.exception("job %s cannot be settled", claimed.id)
                self._settler.fail(batch.maker, claimed, UNDELIVERED)
                return False


def _outcome(
    batch: Batch, number: int, executed: Executed, scored: Sequence[Scored], started_at: float, scoring: Scoring = "",
    ahead: Mapping[int, Future[StoredFile]] = NOTHING,
) -> Drawing | Failure:  # fmt: skip
    if number in executed.failures:
        return executed.failures[number]
    rows = drawn_of(executed, number)
    if len(rows) < len(batch.jobs[number].seeds):
        return DROPPED
    rode_in = [one for one in scored if any(slot.job == number for slot in one.call.slots)]
    return Drawing(
        images=tuple(call.images_BCHW[row] for call, row in rows),
        judged=tuple(
            one.judged[row] for one in rode_in for row, slot in enumerate(one.call.slots) if slot.job == number
        ),
        batch_size=largest_call([call.slots for call in executed.calls], number),
        queue_s=batch.claimed[number].queue_s + started_at - batch.claimed_at,
        inference_s=sum(one.call.inference_s for one in rode_in),
        score_s=sum(one.score_s for one in rode_in),
        scoring=scoring,
        floor=floor_of(batch.runtime.student, batch.rounds[number].asked),
        ahead=ahead,
    )


def _reports(executed: Executed) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"images": len(call.slots), "inference_s": call.inference_s, "splits": call.splits} for call in executed.calls
    )


def when_all(futures: Sequence[Future[bool]], then: Callable[[], None]) -> None:
    """Call ``then`` once, when all of these have ended."""
    if not futures:
        return then()
    left = itertools.count(len(futures) - 1, -1)
    for future in futures:
        future.add_done_callback(lambda _: then() if next(left) == 0 else None)
