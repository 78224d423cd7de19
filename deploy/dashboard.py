"""The queries of the provisioned dashboard and of the rules, for the tests and the dashboard's picture alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
DASHBOARD = FOLDER / "grafana" / "dashboards" / "fewstep.json"
RATE_INTERVAL = "1m"  # four scrapes and more, as Grafana would take
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
NAME = re.compile(r"\bfewstep[a-zA-Z0-9_:]*")


@dataclass(frozen=True)
class Query:
    """One line, or one line for each label set, of a panel; ``legend`` is a template of Grafana."""

    panel: str
    expression: str
    legend: str

    @property
    def needs_gpu(self) -> bool:
        """Whether it has an answer only if a worker has an NVIDIA GPU."""
        return "fewstep_gpu_" in self.expression


@dataclass(frozen=True)
class Panel:
    """A panel; ``threshold`` is drawn as a line."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    threshold: float | None


def panels(path: Path = DASHBOARD) -> list[Panel]:
    """The panels of the dashboard, in order, with the rate interval filled in."""
    listed: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["panels"]
    return [_panel(panel) for panel in listed if panel["type"] != "row"]


def queries(path: Path = DASHBOARD, gpus: bool = True) -> list[Query]:
    """The queries of the dashboard; without ``gpus`` only those that have an answer on any machine."""
    return [query for panel in panels(path) for query in panel.queries if gpus or not query.needs_gpu]


def names(expression: str) -> set[str]:
    """fewstep's names in an expression: metrics, and with colons recording rules."""
    return set(NAME.findall(STRING.sub('""', expression)))


def without_data(asked: Sequence[Query], ask: Callable[[str], list[Any]]) -> list[str]:
    """The queries to which ``ask`` (an instant query: a list of samples) has no answer, or none that is a number."""
    return [f"{q.panel}: {q.expression}" for q in asked if not any(_is_number(row) for row in ask(q.expression))]


def _is_number(row: Any) -> bool:
    return str(row["value"][1]) not in ("NaN", "+Inf", "-Inf")


def _panel(panel: dict[str, Any]) -> Panel:
    defaults = panel["fieldConfig"]["defaults"]
    steps = [step["value"] for step in defaults["thresholds"]["steps"] if step["value"] is not None]
    asked = (
        Query(panel["title"], target["expr"].replace("$__rate_interval", RATE_INTERVAL), target["legendFormat"])
        for target in panel["targets"]
    )
    return Panel(panel["title"], defaults["unit"], tuple(asked), steps[0] if steps else None)
