"""The results of a load: latencies, throughput, goodput at an objective, and their course over time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from fewstep.load.drive import Sample

PERCENTILES = (50, 90, 95, 99)
SLICES = 60  # of a time series, at most


class Latency(BaseModel):
    """Latencies of the requests that were answered with images, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float


class Slice(BaseModel):
    """A slice of time from ``at_s``: its due requests; ``in_flight`` were due before and unanswered at that moment."""

    at_s: float
    requests: int
    errors: int
    in_flight: int
    p50_s: float | None
    p99_s: float | None


class Report(BaseModel):
    """``load`` describes the load. ``window_s`` is the time in which requests were due; ``requests_per_s`` counts the
    answers in ``wall_s``, the time until the last one.

    ``goodput_per_s`` counts the answers within ``objective_s`` in ``window_s``, ``goodput_share`` is their share of all
    requests. ``batch_sizes`` counts images by the largest call of the runtime that they were part of, ``stages`` are
    mean seconds, ``errors`` counts requests without an image by error code. ``series`` is the load over time.
    """

    load: str
    requests: int
    images: int
    window_s: float
    wall_s: float
    offered_per_s: float
    requests_per_s: float
    images_per_s: float
    latency: Latency | None
    objective_s: float | None
    goodput_per_s: float | None
    goodput_share: float | None
    stages: dict[str, float]
    batch_sizes: dict[int, int]
    errors: dict[str, int]
    series: list[Slice]


def report(
    load: str, samples: Sequence[Sample], window_s: float | None = None, objective_s: float | None = None
) -> Report:
    """The report of a load. ``window_s``: how long requests were due; None: until the last answer."""
    answered = [sample for sample in samples if sample.outcome.error is None]
    wall_s = max((sample.done_s for sample in samples), default=0.0)
    window_s = wall_s if window_s is None else window_s
    good = None if objective_s is None else sum(sample.latency_s <= objective_s for sample in answered)
    images = sum(sample.outcome.images for sample in answered)
    return Report(
        load=load,
        requests=len(samples),
        images=images,
        window_s=window_s,
        wall_s=wall_s,
        offered_per_s=_ratio(len(samples), window_s),
        requests_per_s=_ratio(len(answered), wall_s),
        images_per_s=_ratio(images, wall_s),
        latency=latency([sample.latency_s for sample in answered]) if answered else None,
        objective_s=objective_s,
        goodput_per_s=None if good is None else _ratio(good, window_s),
        goodput_share=None if good is None else _ratio(good, len(samples)),
        stages=_stages(answered),
        batch_sizes=_batch_sizes(answered),
        errors=dict(Counter(sample.outcome.error for sample in samples if sample.outcome.error is not None)),
        series=series(samples, window_s),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value with at least ``percent`` per cent of all values at or below it (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def latency(seconds: Sequence[float]) -> Latency:
    """The figures of at least one latency."""
    ranks = {f"p{percent}_s": percentile(seconds, percent) for percent in PERCENTILES}
    return Latency(mean_s=sum(seconds) / len(seconds), max_s=max(seconds), **ranks)


def series(samples: Sequence[Sample], window_s: float) -> list[Slice]:
    """At most 60 slices of whole seconds."""
    width_s = max(1, math.ceil(window_s / SLICES))
    slices: list[list[Sample]] = [[] for _ in range(math.ceil(window_s / width_s))]
    for sample in samples:
        if (k := int(sample.due_s / width_s)) < len(slices):
            slices[k].append(sample)
    return [_slice(k * width_s, due, samples) for k, due in enumerate(slices)]


def _slice(at_s: float, due: Sequence[Sample], samples: Sequence[Sample]) -> Slice:
    seconds = [sample.latency_s for sample in due if sample.outcome.error is None]
    return Slice(
        at_s=at_s,
        requests=len(due),
        errors=len(due) - len(seconds),
        in_flight=sum(sample.due_s < at_s < sample.done_s for sample in samples),
        p50_s=percentile(seconds, 50) if seconds else None,
        p99_s=percentile(seconds, 99) if seconds else None,
    )


def _stages(answered: Sequence[Sample]) -> dict[str, float]:
    """The mean of each stage that every answer has."""
    stages = [sample.outcome.stages for sample in answered]
    names = [name for name in stages[0] if all(name in one for one in stages)] if stages else []
    return {name: sum(one[name] for one in stages) / len(stages) for name in names}


def _batch_sizes(answered: Sequence[Sample]) -> dict[int, int]:
    sizes: Counter[int] = Counter()
    for sample in answered:
        if sample.outcome.batch_size is not None:
            sizes[sample.outcome.batch_size] += sample.outcome.images
    return dict(sorted(sizes.items()))


def _ratio(count: float, of: float) -> float:
    return count / of if of else 0.0
