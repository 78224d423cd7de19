"""What the service costs as something grows: waiting jobs, batch keys, workers, HTTP processes, the size of pictures.

python -m benchmarks.growth                 all curves (about twenty minutes); plots in out/growth.png
python -m benchmarks.growth waiting keys    some of them
python -m benchmarks.growth --short         a try with few points, in a minute or two
python -m benchmarks.growth --write         table and plots also into docs/performance.md and docs/growth.png

Each curve is a power law: the slope of its line on double logarithmic axes is the power with which cost grows. Nothing
should grow faster than its work: a job's cost not at all with what waits, throughput with the workers until the cores
are busy, a picture's cost as its pixels. The same command goes on where it was interrupted (out/growth.json).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.queue_rate import RESULT, _cpu_s, _job
from benchmarks.serving.contenders import Contender, Form
from benchmarks.serving.engine import REPOSITORY
from benchmarks.serving.measure import load, running
from benchmarks.serving.report import write_between
from fewstep.load.drive import closed_loop
from fewstep.load.workload import Request
from service.queue.connection import connect, connect_async
from service.queue.consumer import Consumer
from service.queue.job import Job, QueueOptions
from service.queue.producer import Producer
from service.settings import Settings
from service.supervise.redis_server import EmbeddedServer
from service.worker.pictures import encode

KEPT, PICTURE = REPOSITORY / "out" / "growth.json", REPOSITORY / "out" / "growth.png"
DOCUMENT, SHOWN = REPOSITORY / "docs" / "performance.md", REPOSITORY / "docs" / "growth.png"
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
TOGETHER = 64  # enqueues in flight
MEASURED = 200  # jobs of each point
SECONDS = 6.0  # of load at each point
BUSY = {"workers": 0.4, "apis": 0.0}  # seconds that the fake runtime sleeps in a call: its workers need no core


@dataclass(frozen=True)
class Curve:
    """``points`` are measured one by one; ``most`` is the power up to which the growth is what it should be."""

    name: str
    axis: str
    unit: str
    points: Sequence[int]
    short: Sequence[int]
    most: float
    measure: Callable[[int], dict[str, float]]


@contextmanager
def queue() -> Iterator[tuple[str, redis.Redis]]:
    """A server of its own, and a connection to it."""
    with tempfile.TemporaryDirectory(prefix="fewstep-growth-") as folder:
        server = EmbeddedServer(Path(folder))
        server.start()
        client = connect(server.url)
        try:
            client.config_set("maxmemory", 0)
            yield server.url, client
        finally:
            client.close()
            server.stop()


async def _fill(producer: Producer, jobs: Sequence[Job]) -> None:
    options = QueueOptions(timeout_s=360_000.0)  # a deadline that cannot be kept would be refused
    for first in range(0, len(jobs), TOGETHER):
        said = await asyncio.gather(*(producer.enqueue(job, options) for job in jobs[first : first + TOGETHER]))
        refused = {verdict.word for verdict in said} - {"ok", "known"}
        assert not refused, refused


def _through(waiting: Sequence[Job]) -> dict[str, float]:
    """The server's processor time for a job that is enqueued, claimed and finished while these wait; and how long its
    callers wait for each call."""

    async def run(url: str, client: redis.Redis) -> dict[str, float]:
        api = connect_async(url)
        name = waiting[0].model
        producer = Producer(api, name, "api", ttl_s=3600.0, max_pending=10**7, max_attempts=3)
        consumer = Consumer(client, name, "w", lease_s=600.0, max_attempts=3)
        await _fill(producer, waiting)
        more = [replace(waiting[k % len(waiting)], id=uuid.uuid4().hex) for k in range(MEASURED)]
        before_s, waits = _cpu_s(client), list[float]()
        for job in more:
            started = time.perf_counter()
            await _fill(producer, [job])
            for claimed in consumer.claim({job.lane: 1}):
                consumer.finish(claimed.id, claimed.token, "done", RESULT)
            waits.append(time.perf_counter() - started)
        spent_s = _cpu_s(client) - before_s
        await api.aclose()
        return {"value": spent_s / MEASURED * 1e6, "p50_ms": statistics.median(waits) * 1e3}

    with queue() as (url, client):
        return asyncio.run(run(url, client))


def waiting(count: int) -> dict[str, float]:
    """``count`` jobs of one batch key wait."""
    return _through([_job() for _ in range(count)])


def keys(count: int) -> dict[str, float]:
    """A thousand jobs of ``count`` batch keys wait."""
    jobs = [_job() for _ in range(max(1000, count))]
    return _through([replace(job, height=8 * (1 + k % count)) for k, job in enumerate(jobs)])


def workers(count: int) -> dict[str, float]:
    """Answers a second of ``count`` workers whose calls take 0.4 s and no processor time."""
    return _served({"WORKERS": count}, f"fake:sleep={BUSY['workers']}", 24 * count)


def apis(count: int) -> dict[str, float]:
    """Answers a second of ``count`` HTTP processes; the workers take no time."""
    return _served({"APIS": count, "WORKERS": 2}, "p", 64)


def _served(settings: dict[str, int], prompt: str, users: int) -> dict[str, float]:
    """Of a whole service with the fake runtime."""
    chosen = {f"FEWSTEP_{name}": str(value) for name, value in {**settings, "RUNTIME": "fake"}.items()}

    class Fake(Contender):
        def environment(self, python: Path, port: int, data: Path) -> dict[str, str]:
            return {**super().environment(python, port, data), **chosen}

    def requests() -> Iterator[Request]:
        while True:
            yield {"prompt": prompt, "seed": 1}

    with running(Fake("fewstep", "service.run"), Path(sys.executable), Form(0, 0)) as server:
        load(server, lambda send: closed_loop(send, requests(), users, seconds=2.0))
        samples = load(server, lambda send: closed_loop(send, requests(), users, seconds=SECONDS))
    good = [sample for sample in samples if sample.outcome.error is None]
    per_s = sum(sample.done_s <= SECONDS for sample in good) / SECONDS
    return {"value": per_s, "p50_ms": statistics.median(sample.latency_s for sample in good) * 1e3}


def pixels(side_px: int) -> dict[str, float]:
    """From a picture's array to the JSON of its answer, in milliseconds of processor time."""
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32) / side_px
    noise = np.random.default_rng(1).normal(0, 0.01, (3, side_px, side_px)).astype(np.float32)
    image_CHW = np.stack([x, y, 0.5 * (x + y)]) + noise
    took = []
    for _ in range(5):
        started = time.process_time()
        data = encode(image_CHW, "png")
        hashlib.sha256(data).hexdigest()
        json.dumps({"b64_json": base64.b64encode(data).decode("ascii")})
        took.append(time.process_time() - started)
    return {"value": statistics.median(took) * 1e3}


SERVER = "us of the server a job"
CURVES = (
    Curve("waiting", "jobs that wait", SERVER, (10, 100, 1000, 10_000, 100_000), (10, 300), 0.15, waiting),
    Curve("keys", "batch keys", SERVER, (1, 10, 100, 1000), (1, 30), 0.3, keys),
    Curve("workers", "workers", "answers/s", (1, 2, 4, 8), (1, 2), 1.1, workers),
    Curve("apis", "HTTP processes", "answers/s", (1, 2, 4), (1, 2), 1.1, apis),
    Curve("pixels", "side of a picture, px", "ms a picture", (64, 128, 256, 512, 1024, 2048), (64, 512), 2.15, pixels),
)


def power(points: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the line through the points, by least squares on double logarithmic axes."""
    x, y = np.log(points), np.log(values)
    return float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan


def measured(curves: Sequence[Curve], short: bool) -> dict[str, dict[int, dict[str, float]]]:
    """Every point, with what an interrupted run has left."""
    key = f"{platform.node()} {short} {_code()}"
    try:
        kept: dict[str, Any] = json.loads(KEPT.read_text("utf-8"))
    except (OSError, ValueError):
        kept = {}
    known = kept["known"] if kept.get("key") == key else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    todo = [(curve, point) for curve in curves for point in (curve.short if short else curve.points)]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(todo))
        for curve, point in todo:
            progress.update(task, description=f"{curve.name} {point}")
            values = known.setdefault(curve.name, {})
            if str(point) not in values:
                values[str(point)] = curve.measure(point)
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps({"key": key, "known": known}), "utf-8")
            progress.advance(task)
    wanted = {curve.name: curve.short if short else curve.points for curve in curves}
    return {name: {point: known[name][str(point)] for point in points} for name, points in wanted.items()}


def _code() -> str:
    """Changes with the code that is measured."""
    whole = hashlib.sha256()
    for path in sorted(p for p in (REPOSITORY / "service").rglob("*") if p.suffix in (".py", ".lua")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def table(curves: Sequence[Curve], found: dict[str, dict[int, dict[str, float]]]) -> str:
    """A line for each curve."""
    lines = ["| grows | from | to | cost or rate | power | at most |", "|--|--:|--:|--|--:|--:|"]
    for curve in curves:
        points = list(found[curve.name])
        values = [found[curve.name][point]["value"] for point in points]
        slope, ends = power(points, values), f"{values[0]:.1f} to {values[-1]:.1f} {curve.unit}"
        mark = "" if slope <= curve.most else " (too much)"
        lines.append(f"| {curve.axis} | {points[0]} | {points[-1]} | {ends} | {slope:.2f}{mark} | {curve.most} |")
    return "\n".join(lines)


def plot(curves: Sequence[Curve], found: dict[str, dict[int, dict[str, float]]], file: Path) -> None:
    """A panel for each curve, both axes logarithmic and at least a decade high: what hardly grows looks level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    for axis, curve in zip(np.ravel(figure.subplots(1, len(curves))), curves, strict=True):
        points = list(found[curve.name])
        values = [found[curve.name][point]["value"] for point in points]
        axis.loglog(points, values, marker="o")
        middle, half = math.sqrt(min(values) * max(values)), math.sqrt(max(10.0, 1.7 * max(values) / min(values)))
        axis.set_ylim(middle / half, middle * half)
        axis.set_xticks(points, [f"{point:,}" for point in points])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel=curve.axis, ylabel=curve.unit, title=f"power {power(points, values):.2f}")
        axis.grid(alpha=0.3)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, format="png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", choices=[[], *(curve.name for curve in CURVES)], help="Only these.")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    possible = [curve for curve in CURVES if curve.name != "apis" or "apis" in Settings.model_fields]
    curves = [curve for curve in possible if not chosen.curves or curve.name in chosen.curves]
    found = measured(curves, chosen.short)
    text = table(curves, found)
    print(text)
    plot(curves, found, PICTURE)
    if chosen.write:
        plot(curves, found, SHOWN)
        write_between(DOCUMENT, f"{text}\n\n![How costs grow](growth.png)", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
