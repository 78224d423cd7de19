"""The simulator's prediction and what a real service does under open load, window by window."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.fleet_load import CONNECTIONS, Seen, Target, drawing_s, times_of, workers_of
from benchmarks.fleet_simulation import FULL, WARM_UP, Times, poisson, replay
from fewstep.async_client import AsyncClient
from fewstep.load.report import percentile
from fewstep.retries import Retries

TOLERANCE = 0.15
UNSTEADY = 0.15  # a machine that changed by more while a window lasted says nothing about a prediction
REPLAYS = 20


@dataclass(frozen=True)
class Figures:
    """Latencies in seconds, from the moment of a request to its answer; ``drawing`` is the share of time in which a
    worker's network is at work."""

    mean: float
    p50: float
    p99: float
    drawing: float


@dataclass(frozen=True)
class Window:
    """``predicted`` from the service times before and after it; ``explained`` from those that it had itself, so that
    what is left of a difference is the simulator's. ``drift`` is how much slower the service became meanwhile."""

    requests: int
    predicted: Figures
    explained: Figures
    measured: Figures
    drift: float

    @property
    def steady(self) -> bool:
        return abs(self.drift) <= UNSTEADY

    @property
    def differences(self) -> Mapping[str, float]:
        """Measured over predicted, less 1."""
        return apart(self.measured, self.predicted)


NAMES = ("mean", "p50", "p99", "drawing")


def apart(measured: Figures, predicted: Figures) -> Mapping[str, float]:
    """Measured over predicted, less 1."""
    return {name: getattr(measured, name) / getattr(predicted, name) - 1 for name in NAMES}


def figures(latencies_s: Sequence[float], drawing: float) -> Figures:
    return Figures(
        statistics.fmean(latencies_s), percentile(latencies_s, 50), percentile(latencies_s, 99), drawing
    )  # fmt: skip


def expected(times: Times, moments: Sequence[float], workers: int) -> Figures:
    """What these arrivals should see, over many replays with other draws of the measured times."""
    counted, latencies, drawn = int(WARM_UP * len(moments)), [], []
    for seed in range(REPLAYS):
        replayed, drawing = replay(times, moments, workers, seed)
        latencies += replayed[counted:]
        drawn.append(drawing)
    return figures(latencies, statistics.fmean(drawn) / moments[-1] / workers)


def found(answers: Sequence[Seen], moments: Sequence[float], workers: int) -> Figures:
    """What they did see."""
    counted = [one.took_s for one in answers[int(WARM_UP * len(answers)) :]]
    return figures(counted, drawing_s(answers) / moments[-1] / workers)


async def check(
    url: str, key: str | None, prompt: str, *, rate: float, windows: int, window_s: float, calibration_s: float,
    seed: int, show: Callable[[Window], None],
) -> None:  # fmt: skip
    """Show each window when it is over.

    Raises:
        ValueError: the service is not ready, or could not carry this rate even before the first window.
        FewstepError: a request failed.
    """
    workers = workers_of(url)
    if not workers:
        raise ValueError(f"{url} has no worker that is ready")
    async with AsyncClient(url, api_key=key, connections=CONNECTIONS, retries=Retries(tries=1)) as client:
        target = Target(client, prompt, workers)
        before = await target.measure(calibration_s, seed)
        for number in range(windows):
            capacity = times_of(before).capacity * workers
            if rate > FULL * capacity:
                if number == 0:
                    raise ValueError(f"{rate:g} requests/s are too many: this service carries {capacity:.1f} at most")
                # Others slow the machine down: this window is lost.
                before = await target.measure(calibration_s, seed + number + 1)
                continue
            moments = poisson(rate, max(20, round(rate * window_s)), seed + 1000 * (number + 1))
            answers = await target.observe(moments, seed)
            after = await target.measure(calibration_s, seed + number + 1)
            drift = capacity / (times_of(after).capacity * workers) - 1
            times = times_of([*before, *after], rate)
            own = times_of(answers, claim_s=times.claim_s)
            known, explained = (expected(each, moments, workers) for each in (times, own))
            show(Window(len(moments), known, explained, found(answers, moments, workers), drift))
            before = after


def table(windows: Sequence[Window], first: bool = True) -> str:
    head = f"{'requests':>8s}  " + "  ".join(f"{name + ' predicted, measured':^31s}" for name in NAMES) + "  service"
    lines = [head] if first else []
    for window in windows:
        cells = [f"{window.requests:8d}"]
        for name in NAMES:
            unit, scale = ("%", 100) if name == "drawing" else ("ms", 1000)
            pair = [getattr(side, name) * scale for side in (window.predicted, window.measured)]
            cells.append(f"{pair[0]:9.1f} {pair[1]:9.1f} {unit:2s} {window.differences[name]:+7.1%}".rjust(31))
        cells.append(f"{window.drift:+.0%} slower" + ("" if window.steady else ": not counted"))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def verdict(windows: Sequence[Window]) -> tuple[str, int]:
    """(what the windows say, 0 if the prediction held, 1 if not, 2 if nothing can be said)."""
    counted = [window for window in windows if window.steady]
    own = _medians([apart(window.measured, window.explained) for window in windows])
    own_times = f"With the service times of the windows themselves: {_percentages(own)}."
    if len(counted) * 2 < len(windows):
        return f"Other work on this machine moved the service times by more than 15 % in most windows. {own_times}", 2
    medians = _medians([window.differences for window in counted])
    holds = all(abs(difference) <= TOLERANCE for difference in medians.values())
    within = f"{'within' if holds else 'NOT within'} {TOLERANCE:.0%}"
    said = f"Median of {len(counted)} windows, measured over predicted: {_percentages(medians)}; {within}."
    return f"{said}\n{own_times}", int(not holds)


def _medians(differences: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in differences) for name in NAMES}


def _percentages(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {difference:+.1%}" for name, difference in differences.items())
