"""Draw the dashboard with the answers that Prometheus gives to its queries: a picture of a real run without Grafana.

python -m benchmarks.dashboard_picture --prometheus http://127.0.0.1:9090 --minutes 5 --out docs/dashboard.png
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.dashboard import Panel, panels

COLUMNS = 3
STEP_S = 2
SCALE = {"bytes": (1e-6, "MB"), "percentunit": (100.0, "%"), "s": (1000.0, "ms"), "reqps": (1.0, "1/s")}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Line:
    """One series of a panel; times in seconds before the end (0 is now)."""

    name: str
    times_s: list[float]
    values: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"))
    chosen = parser.parse_args()
    shown = [panel for panel in panels() if not all(query.needs_gpu for query in panel.queries)]
    draw(shown, {panel.title: lines(chosen.prometheus, panel, chosen.minutes * 60) for panel in shown}, chosen.out)


def lines(url: str, panel: Panel, seconds: float) -> list[Line]:
    """The answers to a panel's queries over the last ``seconds``."""
    end = time.time()
    found = []
    for query in panel.queries:
        asked = {"query": query.expression, "start": end - seconds, "end": end, "step": STEP_S}
        with DIRECT.open(f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout=30) as answer:
            rows = json.load(answer)["data"]["result"]
        found += [_line(row, query.legend, end) for row in rows]
    return found


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's template with the labels of one series filled in."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)


def _line(row: Mapping[str, Any], template: str, end: float) -> Line:
    points = [(float(at) - end, float(value)) for at, value in row["values"]]
    return Line(legend(template, row["metric"]), [at for at, _ in points], [value for _, value in points])


def draw(shown: list[Panel], answers: Mapping[str, list[Line]], out: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.style.context("dark_background"):
        rows = -(-len(shown) // COLUMNS)
        figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(15, 2.3 * rows), layout="constrained")
        for panel, axis in zip(shown, axes.flat, strict=False):
            _draw_panel(axis, panel, answers[panel.title])
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        figure.savefig(out, dpi=80)
        pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel, series: list[Line]) -> None:
    scale, unit = SCALE.get(panel.unit, (1.0, ""))
    for line in series:
        axis.plot(line.times_s, [value * scale for value in line.values], linewidth=1.3, label=line.name)
    axis.set_title(f"{panel.title} ({unit})" if unit else panel.title, loc="left", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.15)
    if axis.get_ylim()[0] >= 0 or all(value >= 0 for line in series for value in line.values):
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(lambda at, _: f"{at / 60:.0f} min" if at else "now")
    if series:
        axis.legend(fontsize=7, loc="upper left", ncols=min(3, len(series)), frameon=False)


if __name__ == "__main__":
    main()
