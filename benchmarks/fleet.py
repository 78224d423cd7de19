"""How many workers a load needs, what p99 it then has and what a million images cost: a simulation of the service.

python -m benchmarks.fleet measure --url http://127.0.0.1:8000 --out times.json   service times of one running worker
python -m benchmarks.fleet check --url ... --times times.json --rate 6            the prediction against the service
python -m benchmarks.fleet plan --times times.json --price 2.5                    1 to 10 million images a day

What is simulated: jobs of one image arrive at random (Poisson) and wait in one queue. A free worker takes what waits,
up to its largest batch, and waits for nothing. The call takes ``calls[size]``; then its jobs are encoded, stored and
settled one after the other, ``settle_s`` each, and only then the worker claims again. ``fixed_s`` is what lies outside
the worker: HTTP, queue, the way back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import simpy

from fewstep.answers import Answer
from fewstep.async_client import AsyncClient
from fewstep.load import percentile

DAY_S = 86400.0
WARM_UP = 0.1  # share of the jobs that only fill the queue
PROMPT = "a red heart above a blue star"
CONCURRENCIES = (1, 2, 4, 8, 16, 32)

FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "p50": lambda values: percentile(values, 50),
    "p99": lambda values: percentile(values, 99),
}


@dataclass(frozen=True)
class Times:
    """Measured times in seconds; ``calls`` by batch size, with the largest batch among them."""

    calls: Mapping[int, float]
    settle_s: float = 0.0
    fixed_s: float = 0.0

    @property
    def max_batch(self) -> int:
        return max(self.calls)

    def call_s(self, size: int) -> float:
        """Between two measured sizes the line through them; below the smallest its own time."""
        below = max((known for known in self.calls if known <= size), default=min(self.calls))
        above = min((known for known in self.calls if known >= size), default=self.max_batch)
        if below == above:
            return self.calls[below]
        share = (size - below) / (above - below)
        return self.calls[below] * (1 - share) + self.calls[above] * share

    @property
    def capacity(self) -> float:
        """Images that one worker can draw in a second at best."""
        return max(size / (self.call_s(size) + size * self.settle_s) for size in range(1, self.max_batch + 1))


@dataclass(frozen=True)
class Prediction:
    """Latencies in seconds, from the request to its answer; ``busy`` is the share of time that workers draw."""

    rate: float
    workers: int
    mean_s: float
    p50_s: float
    p99_s: float
    batch: float
    busy: float


class Fleet:
    """Workers and their queue in simulated time."""

    def __init__(self, times: Times, workers: int) -> None:
        self.env = simpy.Environment()
        self.latencies_s: list[float] = []
        self.sizes: list[int] = []
        self.busy_s = 0.0
        self._times = times
        self._waiting: deque[float] = deque()
        self._idle: deque[simpy.Event] = deque()
        for _ in range(workers):
            self.env.process(self._work())

    def run(self, arrivals_s: Iterable[float]) -> None:
        """Until the last of these jobs is done."""
        jobs = list(arrivals_s)
        self.env.process(self._arrive(jobs))
        while len(self.latencies_s) < len(jobs):
            self.env.step()

    def _arrive(self, arrivals_s: Sequence[float]) -> Generator[simpy.Event, Any, None]:
        for at in arrivals_s:
            yield self.env.timeout(at - self.env.now)
            self._waiting.append(at)
            if self._idle:
                self._idle.popleft().succeed()

    def _work(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if not self._waiting:
                free = self.env.event()
                self._idle.append(free)
                yield free
            size = min(len(self._waiting), self._times.max_batch)
            if not size:
                continue  # another worker was faster
            batch = [self._waiting.popleft() for _ in range(size)]
            began = self.env.now
            yield self.env.timeout(self._times.call_s(size))
            for arrived in batch:
                yield self.env.timeout(self._times.settle_s)
                self.latencies_s.append(self.env.now - arrived + self._times.fixed_s)
            self.sizes.append(size)
            self.busy_s += self.env.now - began


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Moments of arrival, in seconds."""
    chance, at, moments = random.Random(seed), 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate)
        moments.append(at)
    return moments


def predict(times: Times, rate: float, workers: int, count: int = 20000, seed: int = 1) -> Prediction:
    """What ``count`` jobs at ``rate`` a second would see."""
    fleet = Fleet(times, workers)
    fleet.run(poisson(rate, count, seed))
    settled = fleet.latencies_s[int(WARM_UP * count) :]
    return Prediction(
        rate, workers, statistics.fmean(settled), percentile(settled, 50), percentile(settled, 99),
        statistics.fmean(fleet.sizes), fleet.busy_s / fleet.env.now / workers,
    )  # fmt: skip


def fewest_workers(times: Times, rate: float, p99_s: float, count: int = 20000) -> Prediction:
    """The smallest fleet that keeps the objective.

    Raises:
        ValueError: no fleet can: one call alone takes longer.
    """
    if times.fixed_s + times.call_s(1) + times.settle_s > p99_s:
        raise ValueError(f"p99 is {p99_s} s: one call alone takes longer")
    low = max(1, math.ceil(rate / times.capacity))
    high = low
    while predict(times, rate, high, count).p99_s > p99_s:
        low, high = high + 1, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if predict(times, rate, middle, count).p99_s <= p99_s else (middle + 1, high)
    return predict(times, rate, low, count)


def dollars_per_million(workers: int, images_per_day: float, price: float) -> float:
    """``price`` of one worker's GPU in an hour, paid all day."""
    return workers * 24 * price / (images_per_day / 1e6)


async def ask(client: AsyncClient, prompt: str, seed: int) -> tuple[float, Answer]:
    """The time that one answer took, and the answer."""
    started = time.perf_counter()
    answer = await client.generate(prompt, seed=seed)
    return time.perf_counter() - started, answer


async def closed(client: AsyncClient, prompt: str, concurrency: int, count: int) -> tuple[float, list[Any]]:
    """(how long it took, the answers) of ``count`` requests, so many at a time."""
    seeds, found = iter(range(count)), []

    async def user() -> None:
        for seed in seeds:
            found.append(await ask(client, prompt, seed))

    started = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(concurrency)))
    return time.perf_counter() - started, found


async def measure(url: str, key: str | None, prompt: str, count: int) -> Times:
    """The service times of a service with one worker, from closed loops of growing width."""
    calls: dict[int, list[float]] = defaultdict(list)
    settles = []
    async with AsyncClient(url, api_key=key) as client:
        await closed(client, prompt, 4, 8)
        _, alone = await closed(client, prompt, 1, count)
        for concurrency in CONCURRENCIES:
            wall_s, answers = await closed(client, prompt, concurrency, count)
            for _, answer in answers:
                calls[answer.batch_size].append(answer.timings.inference_s + answer.timings.score_s)
            drawing_s = sum((a.timings.inference_s + a.timings.score_s) / a.batch_size for _, a in answers)
            if concurrency >= 2 * max(calls):  # the worker never waits: what is left of its time is not drawing
                settles.append(max(0.0, wall_s - drawing_s) / count)
    means = {size: statistics.fmean(values) for size, values in sorted(calls.items()) if len(values) >= 2 * size}
    settle_s = statistics.median(settles)
    fixed_s = statistics.fmean(took - a.timings.inference_s - a.timings.score_s for took, a in alone) - settle_s
    return Times(means, settle_s, max(0.0, fixed_s))


async def observe(url: str, key: str | None, prompt: str, moments: Sequence[float]) -> list[float]:
    """Latencies of requests that are sent at these moments, whatever became of those before."""
    async with AsyncClient(url, api_key=key) as client:
        started = time.perf_counter()

        async def one(number: int, at: float) -> float:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            await ask(client, prompt, number)
            return time.perf_counter() - started - at

        return list(await asyncio.gather(*(one(number, at) for number, at in enumerate(moments))))


def replay(times: Times, moments: Sequence[float], workers: int) -> list[float]:
    """The simulated latencies of the same arrivals."""
    fleet = Fleet(times, workers)
    fleet.run(moments)
    return fleet.latencies_s


def plan(times: Times, price: float, p99_s: float, peak: float) -> str:
    """A table from 1 to 10 million images a day; the busiest hour has ``peak`` times the day's mean."""
    lines = [
        "| images a day | peak images/s | workers | p99 s | busy | images a call | $ a million |",
        "|--:" * 7 + "|",
    ]
    for millions in (1, 2, 5, 10):
        found = fewest_workers(times, millions * 1e6 / DAY_S * peak, p99_s)
        cost = dollars_per_million(found.workers, millions * 1e6, price)
        cells = f"{found.rate:.1f} | {found.workers} | {found.p99_s:.2f} | {found.busy:.0%} | {found.batch:.1f}"
        lines.append(f"| {millions} M | {cells} | {cost:.2f} |")
    return "\n".join(lines)


def read(path: Path) -> Times:
    data = json.loads(path.read_text("utf-8"))
    return Times({int(size): float(s) for size, s in data["calls"].items()}, data["settle_s"], data["fixed_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "check", "plan"])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default=None, help="API key.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--count", type=int, default=200, help="Requests of each loop, or of the check.")
    parser.add_argument("--out", type=Path, default=Path("times.json"))
    parser.add_argument("--times", type=Path, default=Path("times.json"))
    parser.add_argument("--rate", type=float, default=5.0, help="Requests a second.")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--price", type=float, default=2.5, help="Dollars for one worker's GPU in an hour.")
    parser.add_argument("--p99", type=float, default=2.0, help="Objective in seconds.")
    parser.add_argument("--peak", type=float, default=2.0, help="Busiest hour over the day's mean.")
    chosen = parser.parse_args()
    if chosen.what == "measure":
        found = asyncio.run(measure(chosen.url, chosen.key, chosen.prompt, chosen.count))
        chosen.out.write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")
        print(found, f"at most {found.capacity:.1f} images/s", sep="\n")
    elif chosen.what == "check":
        compare(chosen)
    else:
        print(plan(read(chosen.times), chosen.price, chosen.p99, chosen.peak))


def compare(chosen: argparse.Namespace) -> None:
    """Print what was predicted for these arrivals and what was seen."""
    moments = poisson(chosen.rate, chosen.count, seed=7)
    predicted = replay(read(chosen.times), moments, chosen.workers)
    seen = asyncio.run(observe(chosen.url, chosen.key, chosen.prompt, moments))
    for name, figure in FIGURES.items():
        expected, found = figure(predicted), figure(seen)
        print(f"{name:5s} predicted {expected:.3f} s, seen {found:.3f} s: {found / expected - 1:+.1%}")


if __name__ == "__main__":
    main()
