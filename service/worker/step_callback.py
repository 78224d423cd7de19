"""What a worker does between two steps of a batch: check which jobs are cancelled, and publish previews."""

from __future__ import annotations

from collections.abc import Sequence

from service.worker.batch import Batch
from service.worker.batching import Slot, preview_steps
from service.worker.execution import Stopped
from service.worker.finishing import Finisher
from service.worker.heartbeat import Heartbeat
from student.runtimes.runtime import Preview


class StepCallback:
    """Called between the steps of one batch. It waits for nothing: other threads ask the queue and write files."""

    def __init__(self, batch: Batch, heartbeat: Heartbeat, finisher: Finisher) -> None:
        self._batch = batch
        self._heartbeat = heartbeat
        self._finisher = finisher
        self.ended: set[int] = set()

    def __call__(self, slots: Sequence[Slot], step: int, preview: Preview) -> None:
        """Called in the middle of a call of the runtime, after step number ``step``.

        Raises:
            Stopped: nobody needs what the call draws any more.
        """
        self._heartbeat.ask()
        needed = {number for number in {slot.job for slot in slots} if not self._dropped(number)}
        if not needed:
            raise Stopped
        self._show(needed, slots, step, preview)
        for number in sorted(needed):
            if self._batch.jobs[number].frames:  # a video takes long enough for somebody to watch
                self._finisher.advance(self._batch, number, step + 1)

    def _dropped(self, number: int) -> bool:
        reason = self._heartbeat.dropped(self._batch.claimed[number])
        if reason in ("cancelled", "expired") and number not in self.ended:
            self.ended.add(number)
            self._finisher.give_up(self._batch, number)
        return reason is not None

    def _show(self, needed: set[int], slots: Sequence[Slot], step: int, preview: Preview) -> None:
        """One call of the decoder for all that are shown: of several candidates the first."""
        jobs = self._batch.jobs
        wanted = {number: preview_steps(jobs[number].steps, jobs[number].previews) for number in needed}
        draws = [self._batch.rounds[slot.job].draws[slot.index] for slot in slots]
        rows = [row for row, slot in enumerate(slots) if step in wanted.get(slot.job, ()) and not draws[row].candidate]
        if not rows:
            return
        for row, image_CHW in zip(rows, preview(rows), strict=True):
            number = slots[row].job
            self._finisher.show(self._batch, number, wanted[number].index(step), draws[row].image, image_CHW)
