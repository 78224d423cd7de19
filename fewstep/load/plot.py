"""Plots a load: the latencies, and their course over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import WrongUse
from fewstep.load.drive import Sample
from fewstep.load.report import Report


def plot(report: Report, samples: Sequence[Sample], file: Path) -> None:
    """Write a PNG.

    Raises:
        WrongUse: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise WrongUse("A plot needs one more package: pip install matplotlib.") from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    shares, times, rates = figure.subplots(3, 1)
    seconds = sorted(sample.latency_s for sample in samples if sample.outcome.error is None)
    shares.step(seconds, [(k + 1) / len(seconds) for k in range(len(seconds))], where="post")
    if report.objective_s is not None:
        shares.axvline(report.objective_s, linestyle="--", color="gray", label="objective")
        shares.legend()
    shares.set(xlabel="latency, s", ylabel="share of answers", title=report.load, ylim=(0, 1))
    at_s = [part.at_s for part in report.series]
    for name in ("p50_s", "p99_s"):
        values = [getattr(part, name) for part in report.series]
        times.plot(at_s, [float("nan") if value is None else value for value in values], label=name[:-2], marker=".")
    times.set(ylabel="latency, s", ylim=(0, None))
    times.legend()
    for name, counts in (
        ("requests", [part.requests for part in report.series]),
        ("errors", [part.errors for part in report.series]),
        ("in flight", [part.in_flight for part in report.series]),
    ):
        rates.plot(at_s, counts, label=name, marker=".")
    rates.set(xlabel="seconds since the start", ylabel="requests", ylim=(0, None))
    rates.legend()
    try:
        figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise WrongUse(f"{file} cannot be written: {error.strerror}.") from None
