"""The floor under sustained load, over HTTP: its percentile and the queue, while little, much and too much arrives.

python -m benchmarks.floor_under_load            six minutes, most of them asleep; prints the table
python -m benchmarks.floor_under_load --write    table and picture also into docs/

A whole service with the fake runtime, whose calls take STEP_S for each step of each image. Jobs of eight images arrive
at random (Poisson), as many in each phase as its utilisation says, whether or not those before are finished: nothing
slows the arrivals when the queue grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import httpx

from benchmarks.best_of import table
from benchmarks.fleet_load import started_service
from benchmarks.serving.engine import REPOSITORY
from benchmarks.serving.report import write_between
from fewstep.answers import Answer
from fewstep.async_client import AsyncClient

DOCUMENT, SHOWN = REPOSITORY / "docs" / "reward-serving.md", REPOSITORY / "docs" / "floor_under_load.png"
KEPT, PICTURE = REPOSITORY / "out" / "floor_under_load.json", REPOSITORY / "out" / "floor_under_load.png"
STEP_S, IMAGES, FLOOR, CASCADE = 0.04, 8, "p20", (1, 2, 4)
CALL_S = STEP_S * CASCADE[0] * IMAGES  # a job's first round
# Seconds, and the share of the worker's time that first rounds take: further rounds come on top of it.
PHASES = ((60, 0.35), (150, 0.85), (60, 1.2), (120, 0.35))
WINDOW_S, TIMEOUT_S, METRIC = 30, 600.0, "fewstep_queue_depth"


@dataclass(frozen=True)
class Ended:
    """A job: when it was sent and answered, and what its answer says. ``drawn`` are pictures per image."""

    sent_s: float
    took_s: float
    percentile: float
    utilization: float | None  # None: no picture was low enough to ask for it
    drawn: float
    below: float


@dataclass(frozen=True)
class Depth:
    """How many jobs waited at a moment."""

    at_s: float
    jobs: float


@dataclass(frozen=True)
class Course:
    """What was seen from the beginning to the end."""

    ended: Sequence[Ended]
    depths: Sequence[Depth]


def arrivals(phases: Sequence[tuple[float, float]], call_s: float, seed: int) -> list[float]:
    """Moments at which jobs arrive, each of which takes ``call_s``: a Poisson process with each phase's utilisation."""
    chance, moments, start = random.Random(seed), [], 0.0
    for seconds, utilisation in phases:
        at = start + chance.expovariate(utilisation / call_s)
        while at < start + seconds:
            moments.append(at)
            at += chance.expovariate(utilisation / call_s)
        start += seconds
    return moments


def ended(answer: Answer, sent_s: float, took_s: float) -> Ended:
    """What an answer says of the floor."""
    floor, pictures = answer.floor, answer.data
    assert floor is not None and floor.percentile is not None
    return Ended(
        sent_s,
        took_s,
        floor.percentile,
        getattr(floor, "utilization", None),
        fmean(len(picture.candidates or ()) for picture in pictures),
        fmean(bool(picture.below_floor) for picture in pictures),
    )


async def observe(url: str, moments: Sequence[float], seconds: float) -> Course:
    """Send a job at each moment, and ask how many wait once a second."""
    started, found, depths = time.perf_counter(), [], []

    async def job(number: int, at: float, client: AsyncClient) -> None:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        seeds = [number * IMAGES + k for k in range(IMAGES)]
        sent = time.perf_counter()
        answer = await client.generate(
            f"fake:image={STEP_S} {number}", seed=seeds, min_reward=FLOOR, cascade=CASCADE, timeout_s=TIMEOUT_S
        )
        found.append(ended(answer, at, time.perf_counter() - sent))

    async def depth(http: httpx.AsyncClient) -> None:
        for second in range(int(seconds)):
            await asyncio.sleep(max(0.0, started + second - time.perf_counter()))
            text = (await http.get(f"{url}/metrics")).text
            depths.append(Depth(second, depth_in(text)))

    async with AsyncClient(url, connections=1000) as client, httpx.AsyncClient(trust_env=False) as http:
        await asyncio.gather(depth(http), *(job(number, at, client) for number, at in enumerate(moments)))
    return Course(sorted(found, key=lambda one: one.sent_s), depths)


def depth_in(metrics: str) -> float:
    """The jobs that wait, of all models."""
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(METRIC))


def rows_of(course: Course) -> list[list[str]]:
    """A row for each window of WINDOW_S, by when jobs were sent."""
    rows = []
    last_s = max(one.sent_s for one in course.ended)
    for start in range(0, int(last_s) + 1, WINDOW_S):
        jobs = [one for one in course.ended if start <= one.sent_s < start + WINDOW_S]
        depths = [one.jobs for one in course.depths if start <= one.at_s < start + WINDOW_S]
        if not jobs or not depths:
            continue
        asked = [one for one in jobs if one.utilization is not None]
        rows.append([
            f"{start} to {start + WINDOW_S}", f"{len(jobs) * CALL_S / WINDOW_S:.2f}",
            f"{fmean(one.utilization or 0.0 for one in asked):.2f}" if asked else "–",
            f"p{fmean(one.percentile for one in asked or jobs):.1f}",
            f"{fmean(one.drawn for one in jobs):.2f}", f"{fmean(one.below for one in jobs):.2f}",
            f"{fmean(depths):.1f} ({max(depths):.0f})", f"{median(one.took_s for one in jobs):.1f}",
        ])  # fmt: skip
    return rows


HEAD = ("seconds", "arriving", "utilization in the answers", f"floor in effect ({FLOOR} asked)", "pictures an image",
        "below the floor asked", "jobs waiting: mean (most)", "median answer, s")  # fmt: skip


def plot(course: Course, file: Path) -> None:
    """The floor in effect and the queue over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    floor, queue = figure.subplots(2, 1, sharex=True)
    asked = [one for one in course.ended if one.utilization is not None]
    floor.plot([one.sent_s for one in asked], [one.percentile for one in asked], ".", markersize=3)
    floor.set(ylabel=f"floor in effect\n({FLOOR} asked), percentile", ylim=(-1, 22))
    queue.plot([one.at_s for one in course.depths], [one.jobs for one in course.depths])
    queue.set(ylabel="jobs waiting", xlabel="seconds")
    start = 0.0
    for seconds, utilisation in PHASES:
        for axis in (floor, queue):
            axis.axvline(start, color="0.8", linewidth=1)
        floor.text(start + seconds / 2, 20.8, f"{utilisation:.0%} arriving", ha="center", fontsize=8)
        start += seconds
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write table and picture into docs/")
    arguments = parser.parse_args()
    os.environ |= {"FEWSTEP_RUNTIME": "fake", "FEWSTEP_MAX_PENDING_PER_KEY": "1000", "FEWSTEP_RESULT_TTL_S": "60"}
    moments = arrivals(PHASES, CALL_S, 1)
    with started_service() as url:
        course = asyncio.run(observe(url, moments, sum(seconds for seconds, _ in PHASES)))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(asdict(course)), "utf-8")
    text = table(HEAD, rows_of(course))
    print(text)
    plot(course, SHOWN if arguments.write else PICTURE)
    if arguments.write:
        write_between(DOCUMENT, text, "<!-- floor under load: begin -->", "<!-- floor under load: end -->")


if __name__ == "__main__":
    main()
