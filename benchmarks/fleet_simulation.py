"""The service in simulated time: workers, their queue and random arrivals (SimPy).

Jobs of one image wait in one queue. A free worker needs ``claim_s`` to take a batch, whose size the service's own rule
chooses (or a fixed one, for comparison). The call takes one of the times that were measured for its size; then its jobs
are encoded, stored and settled one after the other, and only then the worker claims again. What lies outside the worker
(HTTP, the way back) is added at the end, as it was measured for a batch of that size: its answers go out one after the
other.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from fewstep.load.report import percentile
from service.worker.batch_size import sizes
from service.worker.device import Device

SHAPE = ("", "", 0, 0, 0, 0)  # of all jobs
FULL = 0.95  # share of the capacity beyond which a queue has no steady state within minutes
WARM_UP = 0.1  # share of the jobs that only fill the queue


@dataclass(frozen=True)
class Spread:
    """Measured times in seconds by batch size, sorted; between two sizes the line through the same quantiles."""

    by_size: Mapping[int, Sequence[float]]

    def at(self, size: int, quantile: float) -> float:
        """The time that this share (0 to 1) of all are not above; beyond the measured sizes that of the nearest."""
        below = max((known for known in self.by_size if known <= size), default=min(self.by_size))
        above = min((known for known in self.by_size if known >= size), default=max(self.by_size))
        low, high = (_quantile(self.by_size[known], quantile) for known in (below, above))
        return low if below == above else low + (high - low) * (size - below) / (above - below)

    def mean(self, size: int) -> float:
        below = max((known for known in self.by_size if known <= size), default=min(self.by_size))
        above = min((known for known in self.by_size if known >= size), default=max(self.by_size))
        low, high = (statistics.fmean(self.by_size[known]) for known in (below, above))
        return low if below == above else low + (high - low) * (size - below) / (above - below)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


NOTHING = Spread({1: (0.0,)})


@dataclass(frozen=True)
class Times:
    """Measured times in seconds; ``calls`` of the worker's network, with the largest batch among them, and what lies
    ``outside`` the worker, both by batch size."""

    calls: Spread
    settle_s: float = 0.0
    claim_s: float = 0.0
    outside: Spread = field(default=NOTHING)

    @classmethod
    def steady(cls, calls: Mapping[int, float], settle_s: float = 0.0, outside_s: float = 0.0) -> Times:
        """Times that never vary."""
        return cls(Spread({size: (s,) for size, s in calls.items()}), settle_s, outside=Spread({1: (outside_s,)}))

    @property
    def max_batch(self) -> int:
        return max(self.calls.by_size)

    @property
    def capacity(self) -> float:
        """Images that one worker can draw in a second at best."""
        sizes = range(1, self.max_batch + 1)
        return max(size / (self.claim_s + self.calls.mean(size) + size * self.settle_s) for size in sizes)


@dataclass(frozen=True)
class Batches:
    """How a worker fills its calls: at most ``most`` images (0: by the service's rule), for which it waits so long."""

    most: int = 0
    wait_s: float = 0.0


BY_RULE = Batches()


@dataclass(frozen=True)
class Prediction:
    """Latencies in seconds, from the request to its answer; ``busy`` is the share of time that workers are at work."""

    rate: float
    workers: int
    mean_s: float
    p50_s: float
    p99_s: float
    batch: float
    busy: float


class Fleet:
    """Workers and their queue; ``drawing_s`` is the part of ``busy_s`` that the network takes."""

    def __init__(self, times: Times, workers: int, seed: int = 1, batches: Batches = BY_RULE) -> None:
        self.env = simpy.Environment()
        self.latencies_s: dict[int, float] = {}  # by the job's number
        self.sizes: list[int] = []
        self.busy_s = 0.0
        self.drawing_s = 0.0
        self._times = times
        self._batches = batches
        self._chance = random.Random(seed)
        self._waiting: deque[tuple[int, float]] = deque()
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
        for number, at in enumerate(arrivals_s):
            yield self.env.timeout(at - self.env.now)
            self._waiting.append((number, at))
            if self._idle:
                self._idle.popleft().succeed()

    def _work(self) -> Generator[simpy.Event, Any, None]:
        device = Device(lambda: float(self.env.now))
        while True:
            if not self._waiting:
                free = self.env.event()
                self._idle.append(free)
                yield free
            while (left_s := self._patience_s()) > 0:
                yield self.env.timeout(left_s)
            began = self.env.now
            if self._times.claim_s:
                yield self.env.timeout(self._times.claim_s)
            if size := min(len(self._waiting), self._most(device)):  # else another worker was faster
                yield from self._draw([self._waiting.popleft() for _ in range(size)], device)
            self.busy_s += self.env.now - began

    def _patience_s(self) -> float:
        """How long to wait before it is looked again whether a call is full; 0: it is, or has waited long enough."""
        if not self._waiting or len(self._waiting) >= (self._batches.most or self._times.max_batch):
            return 0.0
        _, oldest = self._waiting[0]
        left_s = oldest + self._batches.wait_s - self.env.now
        return min(left_s, self._batches.wait_s / 10) if left_s > 1e-9 else 0.0

    def _most(self, device: Device) -> int:
        largest = self._times.max_batch
        if self._batches.most:
            return min(self._batches.most, largest)
        load = device.loads().get(SHAPE)
        by_waiting = sizes(load, largest) if load else ()
        return by_waiting[min(max(1, len(self._waiting)), len(by_waiting)) - 1] if by_waiting else largest

    def _draw(self, batch: Sequence[tuple[int, float]], device: Device) -> Generator[simpy.Event, Any, None]:
        size = len(batch)
        call_s = self._times.calls.at(size, self._chance.random())
        device.begin(SHAPE, size, min(arrived for _, arrived in batch))
        yield self.env.timeout(call_s)
        device.measured(SHAPE, size, call_s)
        device.end()
        for number, arrived in batch:
            yield self.env.timeout(self._times.settle_s)
            outside_s = self._times.outside.at(size, self._chance.random())
            self.latencies_s[number] = self.env.now - arrived + outside_s
        self.sizes.append(size)
        self.drawing_s += call_s


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Moments of arrival, in seconds."""
    chance, at, moments = random.Random(seed), 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate)
        moments.append(at)
    return moments


def predict(
    times: Times, rate: float, workers: int, count: int = 20000, seed: int = 1, batches: Batches = BY_RULE
) -> Prediction:
    """What ``count`` jobs at ``rate`` a second would see."""
    fleet = Fleet(times, workers, seed, batches)
    fleet.run(poisson(rate, count, seed))
    settled = [fleet.latencies_s[number] for number in range(int(WARM_UP * count), count)]
    return Prediction(
        rate, workers, statistics.fmean(settled), percentile(settled, 50), percentile(settled, 99),
        statistics.fmean(fleet.sizes), fleet.busy_s / fleet.env.now / workers,
    )  # fmt: skip


def replay(times: Times, moments: Sequence[float], workers: int, seed: int = 1) -> tuple[list[float], float]:
    """(the simulated latencies of the same arrivals, in their order; the seconds that all workers drew)."""
    fleet = Fleet(times, workers, seed)
    fleet.run(moments)
    return [fleet.latencies_s[number] for number in range(len(moments))], fleet.drawing_s


def fewest_workers(times: Times, rate: float, p99_s: float, count: int = 20000) -> Prediction:
    """The smallest fleet that keeps the objective and is never busier than ``FULL``.

    Raises:
        ValueError: no fleet can: one call alone takes longer.
    """
    if times.claim_s + times.calls.mean(1) + times.settle_s + times.outside.mean(1) > p99_s:
        raise ValueError(f"p99 is {p99_s} s: one call alone takes longer")
    low = max(1, math.ceil(rate / (FULL * times.capacity)))
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
