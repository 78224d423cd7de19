"""Loads and their figures, against servers whose answers have a closed form, in simulated time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count, islice
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from fewstep.commands import bench
from fewstep.errors import Busy, Unreachable, WrongUse
from fewstep.load.drive import Outcome, Sample, Send, closed_loop, open_loop
from fewstep.load.plot import plot
from fewstep.load.report import latency, percentile, report, series
from fewstep.load.targets import fewstep_target
from fewstep.load.workload import Arrival, Mix, poisson, read_trace, shares
from tests.fewstep import instant
from tests.service.support import Service

REQUESTS = Mix(["a", "b"], {})


def server(service_s: float, places: int = 1) -> Send:
    """Draws so many at a time, each in the same time; others wait in line."""
    free = asyncio.Semaphore(places)

    async def send(request: object) -> Outcome:
        async with free:
            await asyncio.sleep(service_s)
        return Outcome(1)

    return send


def at(*moments: float) -> list[Arrival]:
    return [Arrival(moment, {"prompt": "p"}) for moment in moments]


def latencies(samples: list[Sample]) -> list[float]:
    return [sample.latency_s for sample in sorted(samples, key=lambda sample: sample.due_s)]


def test_an_open_loop_counts_from_the_moment_a_request_was_due() -> None:
    """One place, 1.5 s each, one request a second: each waits 0.5 s longer than the one before."""
    samples = instant.run(open_loop(server(1.5), at(0, 1, 2, 3, 4)))
    assert latencies(samples) == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5])
    assert [sample.due_s for sample in samples] == [0, 1, 2, 3, 4]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    samples = instant.run(open_loop(server(100.0, places=5), at(0, 1, 2, 3, 4)))
    assert latencies(samples) == pytest.approx([100.0] * 5)


def test_a_client_that_is_full_is_not_hidden() -> None:
    """Two in flight of 3 s each: the third request leaves 1 s late, the fifth 2 s, and their latencies say so."""
    samples = instant.run(open_loop(server(3.0, places=9), at(0, 1, 2, 3, 4), most_in_flight=2))
    assert latencies(samples) == pytest.approx([3, 3, 4, 4, 5])


def test_random_arrivals_wait_as_queueing_theory_says() -> None:
    """M/D/1: the mean wait is rho s / (2 (1 - rho)) (Pollaczek and Khinchine)."""
    service_s, rate = 0.1, 7.0
    arrivals = poisson(REQUESTS.requests(1), rate, 10_000.0, seed=3)
    samples = instant.run(open_loop(server(service_s), arrivals))
    rho = service_s * rate
    assert latency(latencies(samples)).mean_s == pytest.approx(service_s + rho * service_s / (2 * (1 - rho)), rel=0.03)


def test_arrivals_are_poisson_and_follow_from_their_seed() -> None:
    arrivals = poisson(REQUESTS.requests(1), 50.0, 1000.0, seed=1)
    gaps = np.diff([arrival.at_s for arrival in arrivals])
    assert len(arrivals) == pytest.approx(50_000, rel=0.02)
    assert gaps.mean() == pytest.approx(0.02, rel=0.02) and gaps.std() == pytest.approx(0.02, rel=0.02)
    assert arrivals[-1].at_s < 1000.0 and arrivals == poisson(REQUESTS.requests(1), 50.0, 1000.0, seed=1)
    assert arrivals != poisson(REQUESTS.requests(1), 50.0, 1000.0, seed=2)


def test_a_closed_loop_has_so_many_users_and_no_more() -> None:
    """Four users of one place of 0.5 s: two answers a second, and each waits for the other three."""
    samples = instant.run(closed_loop(server(0.5), REQUESTS.requests(1), 4, count=40))
    assert latencies(samples)[4:] == pytest.approx([2.0] * 36)
    found = report("l", samples)
    assert (found.requests, found.wall_s, found.requests_per_s) == (40, pytest.approx(20.0), pytest.approx(2.0))


def test_a_closed_loop_ends_in_time_and_waits_for_the_last_answers() -> None:
    samples = instant.run(closed_loop(server(0.4, places=9), REQUESTS.requests(1), 3, seconds=1.0))
    assert len(samples) == 9 and max(sample.done_s for sample in samples) == pytest.approx(1.2)


def test_goodput_counts_what_came_in_time() -> None:
    """Latencies 1.5, 2, 2.5, 3, 3.5 of requests due within 5 s; two within the objective."""
    found = report("l", instant.run(open_loop(server(1.5), at(0, 1, 2, 3, 4))), 5.0, objective_s=2.25)
    assert found.goodput_per_s == pytest.approx(2 / 5) and found.goodput_share == pytest.approx(2 / 5)
    assert found.offered_per_s == 1.0 and found.wall_s == pytest.approx(7.5)
    assert found.requests_per_s == pytest.approx(5 / 7.5)


def test_the_series_shows_a_queue_that_grows() -> None:
    found = report("l", instant.run(open_loop(server(1.5), at(0.5, 1.5, 2.5, 3.5))), 4.0)
    assert [part.at_s for part in found.series] == [0, 1, 2, 3]
    assert [part.requests for part in found.series] == [1, 1, 1, 1]
    assert [part.p50_s for part in found.series] == pytest.approx([1.5, 2.0, 2.5, 3.0])
    assert [part.in_flight for part in found.series] == [0, 1, 1, 2]


def test_what_is_due_at_the_moment_itself_is_not_in_flight_yet_and_what_is_answered_then_no_more() -> None:
    parts = series(
        [Sample(0.0, 2.0, Outcome(1)), Sample(1.0, 2.5, Outcome(error="x")), Sample(2.0, 9.0, Outcome(1))], 4.0
    )
    assert [part.in_flight for part in parts] == [0, 1, 1, 1] and [part.errors for part in parts] == [0, 1, 0, 0]


def test_the_stages_of_a_report_are_those_that_every_answer_has() -> None:
    stages = [{"queue_s": 1.0, "score_s": 4.0}, {"queue_s": 3.0}, {"queue_s": 2.0, "score_s": 4.0}]
    samples = [Sample(0.0, 1.0, Outcome(1, None, 1, one)) for one in stages]
    assert report("l", samples).stages == report("l", samples[1:]).stages | {"queue_s": 2.0} == {"queue_s": 2.0}


@pytest.mark.parametrize(("window_s", "slices", "width"), [(0.2, 1, 1), (60.0, 60, 1), (61.0, 31, 2), (3600.0, 60, 60)])
def test_a_series_has_at_most_sixty_slices(window_s: float, slices: int, width: int) -> None:
    parts = series([Sample(0.1, 0.2, Outcome(1))], window_s)
    assert len(parts) == slices and parts[-1].at_s == (slices - 1) * width
    assert parts[0].requests == 1 and all(part.p50_s is None for part in parts[1:])


@pytest.mark.parametrize("percent", [1, 50, 90, 95, 99, 100])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 101])
def test_percentiles_are_numpys_by_nearest_rank(percent: float, size: int) -> None:
    values = np.random.default_rng(size).exponential(size=size)
    assert percentile(list(values), percent) == np.percentile(values, percent, method="inverted_cdf")


def test_a_report_counts_what_was_answered() -> None:
    drawn = [Sample(0.0, 0.1 * k, Outcome(2, None, 4, {"queue_s": 0.02 * k})) for k in range(1, 5)]
    samples = [*drawn, Sample(0.0, 2.0, Outcome(error="queue_full")), Sample(0.0, 1.0, Outcome(error="Unreachable"))]
    found = report("l", samples)
    assert (found.requests, found.images, found.images_per_s, found.requests_per_s) == (6, 8, 4.0, 2.0)
    assert found.latency is not None
    assert found.latency.mean_s == pytest.approx(0.25) and found.latency.max_s == pytest.approx(0.4)
    assert found.latency.p50_s == pytest.approx(0.2)
    assert found.stages["queue_s"] == pytest.approx(0.05)
    assert found.batch_sizes == {4: 8} and found.errors == {"queue_full": 1, "Unreachable": 1}
    assert found.goodput_per_s is None
    late = report("l", samples, objective_s=0.35)
    assert late.goodput_share == pytest.approx(3 / 6), "of all that was asked, errors too"


def test_a_report_of_nothing_but_errors() -> None:
    found = report("l", [Sample(0.0, 1.0, Outcome(error="Unreachable"))], objective_s=1.0)
    assert found.latency is None and found.images == 0 and found.errors == {"Unreachable": 1}
    assert found.goodput_share == 0.0


def test_errors_are_counted_by_the_services_code() -> None:
    errors = iter([Busy("Full.", 503, code="queue_full"), Busy("No.", 502), Unreachable("Away.")])

    async def send(request: object) -> Outcome:
        raise next(errors)

    samples = instant.run(closed_loop(send, REQUESTS.requests(1), 1, count=3))
    assert [sample.outcome.error for sample in samples] == ["queue_full", "502", "Unreachable"]


def test_a_mix_is_drawn_by_its_weights() -> None:
    mix = Mix(["a", "b"], {"n": shares(["1:3", "4"], int), "size": shares(["64x64", "128x64:1"], str)})
    drawn = list(islice(mix.requests(seed=1), 8000))
    assert Counter(request["prompt"] for request in drawn) == {"a": 4000, "b": 4000}
    assert sum(request["n"] == 1 for request in drawn) == pytest.approx(6000, rel=0.03)
    assert sum(request["size"] == "64x64" for request in drawn) == pytest.approx(4000, rel=0.05)
    both = sum(request["n"] == 1 and request["size"] == "64x64" for request in drawn)
    assert both == pytest.approx(3000, rel=0.06)  # fields are drawn on their own
    assert drawn == list(islice(mix.requests(seed=1), 8000))


def test_a_model_may_have_a_colon_in_its_name() -> None:
    assert shares(["a:b:2"], str).values == ["a:b"]


@pytest.mark.parametrize("text", ["", ":3", "4:-1", "4:inf", "4:nan", "x", "4:x"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(WrongUse, match="is not a value"):
        shares([text], int)


def test_a_trace_says_when_and_what() -> None:
    lines = ['{"at_s": 2, "prompt": "x", "n": 3}', "", '{"at_s": 0.5}']
    arrivals = read_trace("\n".join(lines), Mix(["a"], {"n": shares(["1"], int)}).requests(1))
    assert arrivals == [Arrival(0.5, {"prompt": "a", "n": 1}), Arrival(2.0, {"prompt": "x", "n": 3})]


@pytest.mark.parametrize(
    "line", ["x", "1", "[]", "{}", '{"at_s": -1}', '{"at_s": NaN}', '{"at_s": Infinity}', '{"at_s": []}', "[" * 100_000]
)
def test_a_line_that_is_no_arrival_is_named(line: str) -> None:
    with pytest.raises(WrongUse, match="Line 2 of the trace"):
        read_trace('{"at_s": 1}\n' + line, REQUESTS.requests(1))
    with pytest.raises(WrongUse, match="has no requests"):
        read_trace("\n", REQUESTS.requests(1))


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    samples = instant.run(open_loop(server(1.5), at(0, 1, 2, 3, 4)))
    plot(report("l", samples, 5.0, 2.0), samples, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 10
    failed = [Sample(0.0, 1.0, Outcome(error="x"))]
    plot(report("l", failed), failed, tmp_path / "b.png")
    with pytest.raises(WrongUse, match="cannot be written"):
        plot(report("l", samples), samples, tmp_path / "no" / "a.png")


def test_a_plot_shows_the_figures_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures = list[Figure]()
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    failed = [Sample(1.25, 1.5, Outcome(error="x")), Sample(1.75, 3.5, Outcome(error="y"))]
    samples = [*instant.run(open_loop(server(1.5), at(0, 1, 2, 3, 4))), *failed]
    plot(found := report("l", samples, 5.0, 2.25), samples, tmp_path / "a.png")
    shares_, times, rates = figures[0].axes
    steps, objective = shares_.lines
    assert list(steps.get_xdata()) == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5]), "of what was answered, rising"
    assert list(steps.get_ydata()) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (set(objective.get_xdata()), shares_.get_title()) == ({2.25}, "l")
    for line, values in zip(times.lines, ([1.5, 2.0, 2.5, 3.0, 3.5],) * 2, strict=True):
        assert list(line.get_xdata()) == [0, 1, 2, 3, 4] and list(line.get_ydata()) == pytest.approx(values)
    assert [line.get_label() for line in times.lines] == ["p50", "p99"]
    counts = {line.get_label(): list(line.get_ydata()) for line in rates.lines}
    in_flight = [part.in_flight for part in found.series]
    assert counts == {"requests": [1, 3, 1, 1, 1], "errors": [0, 2, 0, 0, 0], "in flight": in_flight}


@pytest.mark.parametrize(
    ("options", "most", "warmup"),
    [({}, 4, 3), ({}, 4, 0), ({}, 4, 1), ({"seconds": 0.21}, 4, 2), ({"rate": 40.0, "seconds": 0.25}, 2000, 3)],
)
def test_a_load_is_sent_after_its_warm_up_and_an_open_one_is_not_held_to_its_users(
    options: dict[str, float], most: int, warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, sent = list[tuple[object, ...]](), list[str]()

    @asynccontextmanager
    async def target(*about: object) -> AsyncIterator[Send]:
        async def send(request: Mapping[str, object]) -> Outcome:
            sent.append(str(request["prompt"]))
            await asyncio.sleep(0.02)
            return Outcome(1)

        opened.append(about)
        yield send

    monkeypatch.setattr(bench, "TARGETS", {"openai": target})
    usual = {"requests": 6, "users": 4, "seconds": None, "rate": None, "trace": None, "seed": 1}
    load = bench._load(Mix(["a", "b", "c"], {}), **{**usual, **options})  # type: ignore[arg-type]
    samples = instant.run(bench._run(bench.Api.openai, "http://h", "key", 7.0, load, warmup))
    assert opened == [("http://h", "key", 7.0, most)]
    assert len(samples) == (6 if not options else 44 if "rate" not in options else len(load.arrivals or ()))
    assert sent == list(islice("abc" * 20, warmup)) + list(islice("abc" * 20, len(samples)))


def test_a_real_service_is_sent_no_more_at_once_than_there_are_users(
    live: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, sent = 0, 0, count()
    real = httpx.AsyncHTTPTransport.handle_async_request

    async def counting(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now, most, _ = now + 1, max(most, now + 1), next(sent)
        try:
            response = await real(self, request)
            await response.aread()
            return response
        finally:
            now -= 1

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", counting)

    async def load() -> list[Sample]:
        mix = Mix(["fake:sleep=0.02", "b"], {"n": shares(["2"], int)})
        async with fewstep_target(live.url, None, 30.0, 5) as send:
            return await closed_loop(send, mix.requests(1), 5, count=23)

    found = report("l", asyncio.run(load()))
    assert (found.requests, found.images, found.errors) == (23, 46, {})
    assert sum(found.batch_sizes.values()) == 46 and found.latency is not None and "total_s" in found.stages
    assert next(sent) == 23 and most == 5
