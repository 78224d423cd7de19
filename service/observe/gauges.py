"""Gauges of what a scrape has just seen in the queue: each process says the same, and nothing is added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class SeenGauge:
    """One gauge; without labels it is 0 until it is set."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._family = name, documentation
        self._labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def set(self, value: float, *labels: str) -> None:
        """Note the value for these labels, in the order of the gauge's own."""
        self._values[labels] = float(value)

    def clear(self) -> None:
        """Forget every value."""
        self._values.clear()

    def collect(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(*self._family, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class SeenGauges(Collector):
    """All of them, for a registry."""

    def __init__(self) -> None:
        self._gauges: list[SeenGauge] = []

    def add(self, name: str, documentation: str, labels: Sequence[str] = ()) -> SeenGauge:
        """A new gauge."""
        self._gauges.append(SeenGauge(name, documentation, labels))
        return self._gauges[-1]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return [gauge.collect() for gauge in self._gauges]
