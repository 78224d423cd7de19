"""The worker's side of the queue."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import redis

from service.queue.job import STEPS_DONE, Claimed, readable_lanes
from service.queue.result import write_result
from service.queue.scripts import Scripts

Held = tuple[str, str]  # id, token
PROBES_KEPT_MS = 400 * 86_400_000  # after the last probe


class Consumer:
    """Claims, renews, ends and hands back jobs of one queue for one worker; threads may share it."""

    def __init__(self, client: redis.Redis, queue: str, worker: str, *, lease_s: float, max_attempts: int) -> None:
        self._client = client
        self.worker = worker
        self._lease_ms = round(lease_s * 1000)
        self._max_attempts = max_attempts
        self.order = ""  # what an operator wants of the worker, a WorkerState, as of the last beat
        self._scripts = Scripts(client, queue)

    def claim(
        self, lanes: Mapping[str, int], claim_id: str | None = None,
        sizes: Mapping[tuple[str, str], Sequence[int]] = MappingProxyType({}),
    ) -> list[Claimed]:  # fmt: skip
        """Waiting jobs of one batch key, in order, from whichever lane comes first; empty if nothing waits.

        ``lanes`` has the most images of a batch by lane; only a single job may be larger than that. ``sizes`` has, by
        lane and shape, the images to take when 1, 2, ... wait; the last value holds for any more.
        """
        served = {form: images for lane, images in lanes.items() for form in readable_lanes(lane)}
        wanted = {f"{form}|{shape}": images for (lane, shape), images in sizes.items() for form in readable_lanes(lane)}
        said = (json.dumps(served), self._lease_ms, json.dumps(wanted))
        arguments = (claim_id or uuid.uuid4().hex, *said)
        now_us, token, jobs = self._scripts.run("claim", self.worker, *arguments)
        return [
            Claimed(id, token, payload, int(attempts), (int(now_us) - int(since_us)) / 1e6, best)
            for id, payload, attempts, since_us, best in jobs
        ]

    def wait(self, lanes: Iterable[str], seconds: float) -> None:
        """Return when a job was put into one of the lanes, or after ``seconds`` (also if its wake-up was lost)."""
        served = [form for lane in lanes for form in readable_lanes(lane)]
        self._client.brpop([f"{self._scripts.prefix}w:{lane}" for lane in served], timeout=seconds)

    def beat(
        self, info: Mapping[str, Any], held: Iterable[Held], failed: Mapping[str, int] | None = None
    ) -> dict[str, str]:  # fmt: skip
        """Renew the leases; returns the ids that need no further work, each with 'cancelled', 'expired' or 'lost'.

        ``failed`` says how often each background task of this worker has failed since the last beat.
        """
        said = (json.dumps(info), self._lease_ms, self._max_attempts, json.dumps(failed or {}))
        self.order, dropped = self._scripts.run("beat", self.worker, *said, *_flat(held))
        return dict(dropped)

    def finish(
        self, id: str, token: str, state: str, result: Mapping[str, Any], *, scores_follow: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """End a job; returns its final state, or 'fenced' if it is another worker's by now.

        ``scores_follow``: those of its pictures come later, by ``score``; ``beat`` renews the time for it as it does a
        lease, and without it they count as lost. ``notes`` (see _common.lua) are counted if, and only if, this call is
        the one that ends it.
        """
        within_ms = self._lease_ms if scores_follow else 0
        said = (write_result(result), within_ms, json.dumps(notes or {}))
        return str(self._scripts.run("finish", id, token, state, *said))

    def score(
        self, id: str, token: str, scores: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> str:  # fmt: skip
        """Add the scores to a job that is done, and count the notes; a repeated call changes nothing.

        Returns 'done', or 'fenced' if they come too late.
        """
        return str(self._scripts.run("score", id, token, write_result(scores), json.dumps(notes or {})))

    def advance(
        self, id: str, token: str, result: Mapping[str, Any], *, shape: str, images: int, cost: int
    ) -> str:  # fmt: skip
        """Put a job back for another round, and keep the result of this one; a repeated call changes nothing.

        From now on the job ends with ``result`` if it is given up. ``shape``, ``images`` and ``cost`` are those of the
        next round (see ``Job``). Returns 'queued'; 'done' if it was given up meanwhile; or 'fenced'.
        """
        return str(self._scripts.run("advance", id, token, shape, images, cost, write_result(result)))

    def load(self, id: str, cost: int) -> tuple[float, bool]:
        """The share of the workers' time that first rounds, and working off what waits, take (above 1: they cannot keep
        up), and whether a further round of this job, at that cost, would end after its deadline."""
        millionths, late = self._scripts.run("load", id, cost)
        return int(millionths) / 1e6, bool(late)

    def show(self, id: str, token: str, previews: Mapping[str, str]) -> bool:
        """Announce previews in the result store to a job's watchers; False if another worker holds it by now."""
        return bool(self._scripts.run("show", id, token, *_flat(previews.items())))

    def progress(self, id: str, token: str, steps_done: int) -> bool:
        """Tell whoever watches a job how far it is; False if it is another worker's by now."""
        return self.show(id, token, {STEPS_DONE: str(steps_done)})

    def release(self, held: Iterable[Held]) -> int:
        """Deregister this worker and hand its jobs back, without counting an attempt."""
        return int(self._scripts.run("release", self.worker, *_flat(held)))

    def hand_back(self, held: Iterable[Held], *, spared: bool = False) -> int:
        """Hand back claimed jobs that were not run, without counting an attempt; the worker goes on.

        ``spared``: they were on a device when it failed. Each then runs alone; this is allowed a few times only.
        """
        return int(self._scripts.run("hand_back", int(spared), self._max_attempts, *_flat(held)))

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the queue's counters."""
        pipeline = self._client.pipeline(transaction=False)
        for name, more in counts.items():
            pipeline.hincrby(f"{self._scripts.prefix}n", name, more)
        pipeline.execute()

    def probe_record(self, key: str, measured: str | None = None) -> str | None:
        """What the first probe of this kind has measured, if any has; ``measured`` is kept if it is the first one."""
        name = f"{self._scripts.prefix}pr"
        pipeline = self._client.pipeline(transaction=False)
        if measured is not None:
            pipeline.hsetnx(name, key, measured)
        pipeline.pexpire(name, PROBES_KEPT_MS)
        pipeline.hget(name, key)
        found: str | None = pipeline.execute()[-1]
        return found

    def lost(self, worker: str) -> int:
        """Take a worker's jobs from it at once, because its process is known to be dead."""
        return int(self._scripts.run("lost", worker, self._max_attempts))


def _flat(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [part for pair in pairs for part in pair]
