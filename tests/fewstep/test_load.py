"""The load and its figures."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

from fewstep.answers import Answer, Picture, Timings
from fewstep.async_client import AsyncClient
from fewstep.errors import Busy, Unreachable
from fewstep.load import Sample, percentile, report, run
from fewstep.retries import Retries
from tests.service.support import Service


def answer(images: int, batch: int, queue_s: float) -> Answer:
    picture = Picture(seed=1, width=1, height=1, sha256="", reward={})
    timings = Timings(queue_s=queue_s, inference_s=0.1, score_s=0.0, encode_s=0.0, total_s=1.0)
    return Answer(
        id="a", created=1, model="m", model_version="1", runtime="fake", batch_size=batch, data=[picture] * images,
        timings=timings,
    )  # fmt: skip


@pytest.mark.parametrize("percent", [1, 50, 90, 95, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 101])
def test_percentiles_are_numpys_by_nearest_rank(percent: float, count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    assert percentile(list(values), percent) == np.percentile(values, percent, method="inverted_cdf")


def test_a_report_counts_what_was_answered() -> None:
    samples = [Sample(0.1 * k, answer(2, 4, 0.02 * k)) for k in range(1, 5)]
    samples += [Sample(9.0, Busy("Full.", 503, code="queue_full")), Sample(9.0, Unreachable("Away."))]
    told = report(samples, concurrency=3, wall_s=2.0)
    assert (told.requests, told.images, told.images_per_s, told.requests_per_s) == (6, 8, 4.0, 2.0)
    assert told.latency is not None
    assert told.latency.mean_s == pytest.approx(0.25) and told.latency.max_s == pytest.approx(0.4)
    assert told.latency.p50_s == pytest.approx(0.2)
    assert told.stages["queue_s"] == pytest.approx(0.05)
    assert told.batch_sizes == {4: 8} and told.errors == {"queue_full": 1, "Unreachable": 1}


def test_a_report_of_nothing_but_errors() -> None:
    told = report([Sample(1.0, Unreachable("Away."))], concurrency=1, wall_s=1.0)
    assert told.latency is None and told.images == 0 and told.errors == {"Unreachable": 1}


class Counting(httpx.AsyncHTTPTransport):
    """The real transport; it notes how many requests were under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.all = 0, 0, 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.now += 1
        self.all += 1
        self.most = max(self.most, self.now)
        try:
            response = await super().handle_async_request(request)
            await response.aread()
            return response
        finally:
            self.now -= 1


def test_the_load_is_closed_and_bounded(live: Service) -> None:
    transport = Counting()

    async def load() -> None:
        async with AsyncClient(live.url, retries=Retries(tries=1), transport=transport) as client:
            told = await run(client, ["fake:sleep=0.02", "b"], {"n": 2}, requests=23, concurrency=5)
        assert (told.requests, told.images, told.errors) == (23, 46, {})
        assert sum(told.batch_sizes.values()) == 46 and told.latency is not None

    asyncio.run(load())
    assert transport.all == 23 and transport.most == 5
