"""``make bench-check``: has the service become slower? Ratios of one run against those of a committed baseline.

python -m benchmarks.check            compares (about three minutes); status 1 if something is worse than is allowed
python -m benchmarks.check --write    writes benchmarks/baseline.json anew, on a machine that does nothing else

Every figure is a ratio of two things that were measured in turns in the same run, so that it means the same on another
machine, and the median over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import queue_rate
from benchmarks.serving.__main__ import bare
from benchmarks.serving.contenders import CONTENDERS, Form
from benchmarks.serving.measure import closed, running
from service.queue.connection import connect
from service.supervise.redis_server import EmbeddedServer
from service.worker.pictures import PNG_LEVEL, encode

BASELINE = Path(__file__).parent / "baseline.json"
SIDE_PX = 512
PINGS = 20_000
ENCODED = 5


@dataclass(frozen=True)
class Ratio:
    """``allowed`` is by how much of the baseline it may be worse."""

    name: str
    larger_is_better: bool
    allowed: float

    def worse(self, now: float, before: float) -> float:
        """By which share it is worse than before; negative: better."""
        return before / now - 1 if self.larger_is_better else now / before - 1


RATIOS = (
    Ratio("throughput at 8 users / the engine alone", True, 0.15),
    Ratio("throughput at 32 users / the engine alone", True, 0.15),
    Ratio("p50 of one user / a picture of the engine alone", False, 0.25),
    Ratio("CPU of an answer at 32 users / CPU of a picture of the engine alone", False, 0.15),
    Ratio("the queue server's CPU of a job / of a PING", False, 0.15),
    Ratio("a PNG / its compression alone", False, 0.25),
)


def served(seconds: float, rounds: int, advance: Callable[[], None]) -> dict[str, float]:
    """The service with its defaults, in turns with the engine alone: one process with a thread for each core."""
    ours, cores = CONTENDERS[0], os.cpu_count() or 1
    found: dict[str, list[float]] = {ratio.name: [] for ratio in RATIOS[:4]}
    with running(ours, Path(sys.executable), Form(0, 0)) as server:
        closed(server, 8, min(3.0, seconds))
        for _ in range(rounds):
            one, eight, many = (closed(server, users, seconds) for users in (1, 8, 32))
            alone, single = bare(Form(1, cores), 8, seconds), bare(Form(1, cores), 1, seconds)
            slowest = bare(Form(1, 1), 8, seconds)  # one thread: its CPU time is its wall time
            values = (eight["per_s"] / alone, many["per_s"] / alone, one["p50_s"] * single, many["cpu_s"] * slowest)
            for ratio, value in zip(RATIOS, values, strict=False):
                found[ratio.name].append(value)
            advance()
    return {name: statistics.median(values) for name, values in found.items()}


def queued(rounds: int, advance: Callable[[], None]) -> float:
    """Processor time of the queue's server for a job, in PINGs."""
    found = []
    with tempfile.TemporaryDirectory(prefix="fewstep-check-") as folder:
        server = EmbeddedServer(Path(folder))
        server.start()
        client = connect(server.url)
        try:
            for _ in range(rounds):
                rate = asyncio.run(queue_rate.run(server.url, 500, 8, 64))
                before_s = queue_rate._cpu_s(client)
                for _ in range(PINGS):
                    client.ping()
                found.append(rate.server_s / ((queue_rate._cpu_s(client) - before_s) / PINGS))
                advance()
        finally:
            client.close()
            server.stop()
    return statistics.median(found)


def encoded(rounds: int) -> float:
    """A PNG of a smooth picture with a little noise, in compressions of its pixels."""
    chance = np.random.default_rng(1)
    image_CHW = np.linspace(0, 1, SIDE_PX, dtype=np.float32) + chance.normal(0, 0.01, (3, SIDE_PX, SIDE_PX))
    image_CHW = image_CHW.astype(np.float32)
    raw = np.rint(np.clip(image_CHW, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).tobytes()
    found = []
    for _ in range(rounds * ENCODED):
        at = process_time()
        encode(image_CHW, "png")
        between = process_time()
        zlib.compress(raw, PNG_LEVEL)
        found.append((between - at) / (process_time() - between))
    return statistics.median(found)


def measure(seconds: float, rounds: int) -> dict[str, float]:
    """All ratios."""
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("bench-check", total=2 * rounds + 1)

        def advance() -> None:
            progress.advance(task)

        found = served(seconds, rounds, advance)
        found[RATIOS[4].name] = queued(rounds, advance)
        found[RATIOS[5].name] = encoded(rounds)
        advance()
    return found


def compare(now: dict[str, float], before: dict[str, float]) -> tuple[str, list[str]]:
    """A table, and the names of what is worse than is allowed."""
    lines, worse = [f"{'ratio':<70} {'before':>8} {'now':>8} {'worse by':>9} {'allowed':>8}"], []
    for ratio in RATIOS:
        if ratio.name not in before:
            lines.append(f"{ratio.name:<70} {'-':>8} {now[ratio.name]:8.3f}")
            continue
        share = ratio.worse(now[ratio.name], before[ratio.name])
        if math.isnan(share) or share > ratio.allowed:
            worse.append(ratio.name)
        values = f"{before[ratio.name]:8.3f} {now[ratio.name]:8.3f} {share:+9.0%} {ratio.allowed:8.0%}"
        lines.append(f"{ratio.name:<70} {values}")
    return "\n".join(lines), worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each point.")
    parser.add_argument("--rounds", type=int, default=4)
    chosen = parser.parse_args()
    now = measure(chosen.seconds, chosen.rounds)
    if chosen.write:
        kept = {name: round(value, 4) for name, value in now.items()}
        BASELINE.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    try:
        before = json.loads(BASELINE.read_text("utf-8"))
    except FileNotFoundError:
        print(f"There is no {BASELINE}: write one with --write, on a machine that does nothing else.", file=sys.stderr)
        before = {}
    said, worse = compare(now, before)
    print(said)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
