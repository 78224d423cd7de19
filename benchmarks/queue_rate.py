"""python -m benchmarks.queue_rate [--url redis://...]: how many jobs a second the queue's server carries.

One process enqueues, claims in batches and settles, with the scripts of the service and a pause for nothing. The figure
that counts is the server's own processor time for a job, from which follows what one core of it carries: the clients
beside it would be many.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import redis

from service.queue.connection import connect, connect_async
from service.queue.consumer import Consumer
from service.queue.job import Job, QueueOptions
from service.queue.producer import Producer
from service.supervise.redis_server import EmbeddedServer

QUEUE = "queue-rate"
TOGETHER = 32  # enqueues in flight
RESULT = {
    "runtime": "r", "calls": [{"images": 1, "inference_s": 0.01}],
    "images": [{"file": "x" * 60, "seed": 1, "width": 64, "height": 64, "sha256": "0" * 64, "reward": {"s": 0.1}}],
    "timings": {"queue_s": 0.1, "inference_s": 0.1, "score_s": 0.0, "encode_s": 0.0}, "batch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """``server_s``: processor time of the server for one job; ``clients`` the rate of this one process."""

    jobs: int
    batch: int
    clients: float
    server_s: float

    @property
    def of_one_core(self) -> float:
        """Jobs a second at which one core of the server is busy all the time."""
        return 1 / self.server_s


async def run(url: str, jobs: int, batch: int, waiting: int) -> Rate:
    """Push ``jobs`` jobs through, of which ``waiting`` wait at a time."""
    client, worker = connect_async(url), connect(url)
    producer = Producer(client, QUEUE, "api", ttl_s=60.0, max_pending=jobs + 1, max_attempts=3)
    consumer = Consumer(worker, QUEUE, "w", lease_s=30.0, max_attempts=3)
    asked = [_job() for _ in range(jobs)]
    before_s, started = _cpu_s(worker), time.perf_counter()
    options = QueueOptions(timeout_s=3600.0)  # a deadline that cannot be kept would be refused
    for first in range(0, jobs, waiting):
        for part in range(first, min(first + waiting, jobs), TOGETHER):
            said = await asyncio.gather(*(producer.enqueue(job, options) for job in asked[part : part + TOGETHER]))
            refused = {verdict.word for verdict in said} - {"ok", "known"}  # known: repeated after a lost reply
            assert not refused, refused
        while claimed := consumer.claim({asked[0].lane: batch}):
            consumer.beat({}, [(job.id, job.token) for job in claimed])
            for job in claimed:
                consumer.finish(job.id, job.token, "done", RESULT)
    took_s, spent_s = time.perf_counter() - started, _cpu_s(worker) - before_s
    await client.aclose()
    worker.close()
    return Rate(jobs, batch, jobs / took_s, spent_s / jobs)


def _cpu_s(client: redis.Redis) -> float:
    used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def _job() -> Job:
    return Job(
        id=uuid.uuid4().hex, key="anonymous", model=QUEUE, version="1", height=64, width=64, steps=4,
        prompt="a red heart above a blue star", seeds=(7,), output_format="png", quality=None,
        response_format="b64_json", previews=0, priority=0, user=None, metadata={}, request_id="r" * 32,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="Without it a server of its own, append-only as the service's.")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--waiting", type=int, default=64, help="Jobs that wait at a time.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        server = None if chosen.url else EmbeddedServer(Path(folder))
        if server:
            server.start()
        try:
            for batch in (1, 8):
                found = asyncio.run(
                    run(chosen.url or (server.url if server else ""), chosen.jobs, batch, chosen.waiting)
                )
                cost = f"{found.server_s * 1e6:.0f} us of the server a job: {found.of_one_core:.0f} jobs/s a core"
                print(f"claims of {batch}: {cost} (this process alone: {found.clients:.0f} jobs/s)")
        finally:
            if server:
                server.stop()


if __name__ == "__main__":
    main()
