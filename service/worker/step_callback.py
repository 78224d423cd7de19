"""What a worker does between two steps of a batch: hear who needs no more, and show who wants to see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from service.queue.consumer import Consumer
from service.queue.job import Claimed, Job
from service.results.store import ResultStore
from service.worker.batching import Slot, preview_steps
from service.worker.execution import Stopped
from service.worker.heartbeat import Heartbeat
from service.worker.pictures import encode
from service.worker.provenance import Provenance
from student.runtimes.runtime import Preview

log = logging.getLogger(__name__)


class StepCallback:
    """Looks up between the steps of one batch; ``settle`` ends a job that was given up, before its mates are done."""

    def __init__(
        self, jobs: Sequence[tuple[Claimed, Job]], heartbeat: Heartbeat, consumer: Consumer, store: ResultStore,
        made_by: Provenance | None, settle: Callable[[Claimed], None],
    ) -> None:  # fmt: skip
        self._jobs = jobs
        self._heartbeat = heartbeat
        self._consumer = consumer
        self._store = store
        self._made_by = made_by
        self._settle = settle
        self._settled: set[str] = set()

    def __call__(self, slots: Sequence[Slot], step: int, preview: Preview) -> None:
        """Called in the middle of a call of the runtime, after step number ``step``.

        Raises:
            Stopped: nobody needs what the call draws any more.
        """
        self._heartbeat.beat(self._consumer)
        riding = sorted({slot.job for slot in slots})
        needed = [number for number in riding if not self._dropped(number)]
        if not needed:
            raise Stopped
        for number in needed:
            self._show(number, slots, step, preview)

    def _dropped(self, number: int) -> bool:
        claimed, job = self._jobs[number]
        reason = self._heartbeat.dropped(job.id)
        if reason in ("cancelled", "expired") and job.id not in self._settled:
            self._settled.add(job.id)
            self._settle(claimed)
        return reason is not None

    def _show(self, number: int, slots: Sequence[Slot], step: int, preview: Preview) -> None:
        claimed, job = self._jobs[number]
        wanted = preview_steps(job.steps, job.previews)
        if step not in wanted:
            return
        rows = [row for row, slot in enumerate(slots) if slot.job == number]
        shown: dict[str, str] = {}
        try:
            for row, image_CHW in zip(rows, preview(rows), strict=True):
                data = encode(image_CHW, job.output_format, job.quality, self._made_by)
                name = f"p{wanted.index(step)}-{slots[row].index}"
                reference = self._store.put(job.id, claimed.token, name, job.output_format, data)
                shown[f"{wanted.index(step)}:{slots[row].index}"] = reference
            self._consumer.show(job.id, claimed.token, shown)
        except (OSError, RedisError) as error:
            log.warning("a preview of job %s is left out: %s", job.id, error)
