"""What a running service is like under load: its service times, and its latencies under random arrivals.

Service times depend on the load where HTTP process, client and worker share cores. So they are measured at several
loads: by one user, and by many who think between two requests for so long that they ask for a quarter, a half and three
quarters of what the service can do, and for all of it. Their thinking is random, so requests do not come in step with
answers and batches of every size form. Of these answers those count that were given at the loads next to the one asked
about.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from benchmarks.fleet_simulation import Spread, Times
from fewstep.answers import Answer
from fewstep.async_client import AsyncClient

REPOSITORY = Path(__file__).resolve().parent.parent
CONNECTIONS = 2000
LEAST_USERS, MOST_USERS = 16, 128  # of one worker
SHARES = (0.25, 0.5, 0.75)  # of what the service can do
ENOUGH_CALLS = 3  # of a size, to know its time
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Seen:
    """One answer at a rate of ``rate`` answers a second (0: a single user): how long its client waited, and for what.

    ``draw_s`` is the call that it shared with ``size - 1`` others, ``after_s`` the worker's time for it and for those
    of its batch before it once that was over, ``outside_s`` what is not between acceptance and end.
    """

    rate: float
    took_s: float
    size: int
    queue_s: float
    draw_s: float
    after_s: float
    outside_s: float


def seen(answer: Answer, took_s: float) -> Seen:
    timings = answer.timings
    draw_s = timings.inference_s + timings.score_s
    after_s = max(0.0, timings.total_s - timings.queue_s - draw_s)
    outside_s = max(0.0, took_s - timings.total_s)
    return Seen(0.0, took_s, answer.batch_size, timings.queue_s, draw_s, after_s, outside_s)


def near(answers: Sequence[Seen], rate: float) -> list[Seen]:
    """Those that were given at the loads next to this rate, below and above; of sizes that they lack, all others."""
    below = max((one.rate for one in answers if one.rate <= rate), default=None)
    above = min((one.rate for one in answers if one.rate > rate), default=None)
    # Loads of one kind differ a little from one measurement to the next: a tenth apart is the same load.
    chosen = [
        one for one in answers if any(end is not None and abs(one.rate - end) <= 0.1 * end for end in (below, above))
    ]
    enough = {size for size in {one.size for one in chosen} if _enough([o for o in chosen if o.size == size])}
    return [one for one in chosen if one.size in enough] + [one for one in answers if one.size not in enough]


def _enough(answers: Sequence[Seen]) -> bool:
    return len(answers) >= ENOUGH_CALLS * answers[0].size


def times_of(answers: Sequence[Seen], rate: float | None = None, claim_s: float | None = None) -> Times:
    """The service times that these answers tell, at ``rate`` if one is named.

    Without ``claim_s``, some of them must have been given to a single user.
    """
    alone = [one.queue_s for one in answers if one.rate == 0]  # nobody was before them: that is what a claim takes
    answers = answers if rate is None else near(answers, rate)
    draws, outside = defaultdict(list), defaultdict(list)
    for one in answers:
        draws[one.size].append(one.draw_s)
        outside[one.size].append(one.outside_s)
    known = {one.size for one in answers if len(draws[one.size]) >= ENOUGH_CALLS * one.size} | {min(draws)}
    # The k-th of a batch waits for k pictures to be settled: (size + 1) / 2 on average.
    settle_s = sum(one.after_s for one in answers) / sum((one.size + 1) / 2 for one in answers)
    return Times(
        Spread({size: sorted(draws[size]) for size in sorted(known)}),
        settle_s,
        statistics.median(alone) if claim_s is None else claim_s,
        Spread({size: sorted(outside[size]) for size in sorted(known)}),
    )


@dataclass(frozen=True)
class Target:
    """A service, what is asked of it, and how many workers it has."""

    client: AsyncClient
    prompt: str
    workers: int

    async def ask(self, seed: int, due: float) -> Seen:
        answer = await self.client.generate(self.prompt, seed=seed)
        return seen(answer, time.perf_counter() - due)

    async def users(self, count: int, seconds: float, think_s: float, seed: int) -> list[Seen]:
        """What ``count`` users see, who wait for an answer, think (``think_s`` on average) and ask again."""
        found: list[Seen] = []
        chance, until = random.Random(seed), time.perf_counter() + seconds

        async def user() -> None:
            while time.perf_counter() < until:
                await asyncio.sleep(chance.expovariate(1 / think_s))
                found.append(await self.ask(chance.randrange(2**31), time.perf_counter()))

        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(count)))
        rate = 0.0 if count == 1 else len(found) / (time.perf_counter() - started)
        return [replace(one, rate=rate) for one in found]

    async def measure(self, seconds: float, seed: int = 0) -> list[Seen]:
        """Answers at each of the loads, ``seconds`` seconds of each."""
        await self.users(2 * self.workers, min(2.0, seconds), 0.001, seed)  # warms up
        found = await self.users(1, seconds, 0.001, seed)
        draw_s = statistics.fmean(one.draw_s for one in found)
        count = LEAST_USERS * self.workers
        most = await self.users(count, seconds, draw_s, seed)
        while count < 2 * self.workers * max(one.size for one in most) and count < MOST_USERS * self.workers:
            count *= 2
            most = await self.users(count, seconds, draw_s, seed)
        for share in SHARES:
            think_s = max(draw_s, count / (share * most[0].rate) - draw_s)
            found += await self.users(count, max(seconds, 2 * think_s), think_s, seed)
        return found + most

    async def observe(self, moments: Sequence[float], seed: int) -> list[Seen]:
        """Requests sent at these moments, whatever became of those before; ``took_s`` counts from the moment."""
        started = time.perf_counter()

        async def one(number: int, at: float) -> Seen:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            return await self.ask(seed + number, started + at)

        return list(await asyncio.gather(*(one(number, at) for number, at in enumerate(moments))))


def drawing_s(answers: Iterable[Seen]) -> float:
    """The time that the workers' networks took for them."""
    return sum(one.draw_s / one.size for one in answers)


def workers_of(url: str) -> int:
    """How many workers a service has; 0 while it is not ready."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
        return int(answer.json()["workers"]) if answer.is_success else 0
    except httpx.HTTPError:
        return 0


@contextmanager
def started_service() -> Iterator[str]:
    """The URL of a service of our own, with whatever FEWSTEP_ variables say; it ends with the context.

    Raises:
        RuntimeError: it does not become ready, with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-fleet-") as folder:
        log = Path(folder) / "log"
        environment = {
            "FEWSTEP_WORKERS": "1",
            **os.environ,
            "FEWSTEP_PORT": "0",
            "FEWSTEP_DATA_DIR": str(Path(folder) / "data"),
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "service.run"], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
            )
        try:
            yield _wait_for(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            finally:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        for word in log.read_text("utf-8").split():
            url = word.rstrip("/.,")
            if url.startswith("http://") and workers_of(url):
                return url
        time.sleep(0.2)
    raise RuntimeError("the service does not start: " + " ".join(log.read_text("utf-8").splitlines()[-1:]))
