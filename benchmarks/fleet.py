"""How many workers a load needs, what p99 it then has and what a million images cost: a simulation of the service.

python -m benchmarks.fleet check --rate 12                       predicted and measured, on a service that it starts
python -m benchmarks.fleet check --rate 12 --url URL --key KEY   the same on one that runs
python -m benchmarks.fleet measure --url URL --out times.json    service times of a running service
python -m benchmarks.fleet plan --times times.json --price 2.5   1 to 10 million images a day
python -m benchmarks.fleet cost --fixed 0.03 --step 0.05 --steps 1 4 --price 2.5    the same from assumed times
python -m benchmarks.fleet batches --fixed 0.002 --step 0.008    how many images of so many seconds should share a call?

A check takes about (WINDOWS + 1) x 5 x CALIBRATION + WINDOWS x WINDOW seconds: twelve minutes unless told otherwise.
Service times are measured before and after each window, at other loads than the one that is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.fleet_batches import batches, steady
from benchmarks.fleet_check import Window, check, table, verdict
from benchmarks.fleet_load import Target, started_service, times_of, workers_of
from benchmarks.fleet_simulation import Spread, Times, dollars_per_million, fewest_workers
from fewstep.async_client import AsyncClient
from fewstep.errors import FewstepError

DAY_S = 86400.0
PROMPT = "a red heart above a blue star"
MILLIONS = (1, 2, 5, 10)
QUANTILES = 100  # that are kept of each size


def read(path: Path) -> Times:
    """Times that ``write`` has written."""
    data = json.loads(path.read_text("utf-8"))
    calls, outside = (
        Spread({int(size): values for size, values in data[name]["by_size"].items()}) for name in ("calls", "outside")
    )
    return Times(calls, data["settle_s"], data["claim_s"], outside)


def write(times: Times, path: Path) -> None:
    path.write_text(json.dumps(asdict(_thinned(times)), indent=1) + "\n", "utf-8")


def _thinned(times: Times) -> Times:
    def thin(spread: Spread) -> Spread:
        shares = [(2 * k + 1) / (2 * QUANTILES) for k in range(QUANTILES)]
        return Spread({size: [spread.at(size, share) for share in shares] for size in spread.by_size})

    return Times(thin(times.calls), times.settle_s, times.claim_s, thin(times.outside))


def plan(times: Times, price: float, p99_s: float, peak: float) -> str:
    """A table from 1 to 10 million images a day; the busiest hour has ``peak`` times the day's mean."""
    lines = [
        "| images a day | peak images/s | workers | p99 s | busy | images a call | $ a million |",
        "|--:" * 7 + "|",
    ]
    for millions in MILLIONS:
        found = fewest_workers(times, millions * 1e6 / DAY_S * peak, p99_s)
        cost = dollars_per_million(found.workers, millions * 1e6, price)
        cells = f"{found.rate:.1f} | {found.workers} | {found.p99_s:.2f} | {found.busy:.0%} | {found.batch:.1f}"
        lines.append(f"| {millions} M | {cells} | {cost:.2f} |")
    return "\n".join(lines)


def cost(
    fixed_s: float, step_s: float, steps: Sequence[int], prices: Sequence[float], p99_s: float, peak: float,
    millions: Sequence[int] = MILLIONS,
) -> str:  # fmt: skip
    """GPUs, and dollars for a million images at each price, by step count.

    A call takes ``fixed_s + steps * step_s`` and draws one image.
    """
    titles = ["images a day", "steps", "GPUs", "p99 s", "busy", *(f"at ${price:.2f} an hour" for price in prices)]
    lines = [f"| {' | '.join(titles)} |", "|--:" * len(titles) + "|"]
    for count in steps:
        times = Times.steady({1: fixed_s + count * step_s})
        for each in millions:
            found = fewest_workers(times, each * 1e6 / DAY_S * peak, p99_s)
            costs = " | ".join(f"{dollars_per_million(found.workers, each * 1e6, price):.0f}" for price in prices)
            cells = f"{each} M | {count} | {found.workers} | {found.p99_s:.2f} | {found.busy:.0%}"
            lines.append(f"| {cells} | {costs} |")
    return "\n".join(lines)


@contextmanager
def service(url: str | None) -> Iterator[str]:
    if url:
        yield url.rstrip("/")
    else:
        with started_service() as started:
            yield started


async def measure(url: str, key: str | None, prompt: str, seconds: float) -> Times:
    """The service times of a running service; ``seconds`` seconds at each of five loads."""
    async with AsyncClient(url, api_key=key) as client:
        return times_of(await Target(client, prompt, workers_of(url)).measure(seconds))


def run_check(chosen: argparse.Namespace) -> int:
    """0 if the prediction held, 1 if not, 2 if the machine was too unsteady to tell."""

    def show(window: Window) -> None:
        print(table([window], first=shown == []), flush=True)
        shown.append(window)

    shown: list[Window] = []
    with service(chosen.url) as url:
        asyncio.run(
            check(
                url, chosen.key, chosen.prompt, rate=chosen.rate, windows=chosen.windows, window_s=chosen.window,
                calibration_s=chosen.calibration, seed=chosen.seed, show=show,
            )
        )  # fmt: skip
    said, status = verdict(shown)
    print(said)
    return status


def main() -> int:
    chosen = arguments().parse_args()
    try:
        if chosen.what == "check":
            return run_check(chosen)
        if chosen.what == "measure":
            with service(chosen.url) as url:
                found = asyncio.run(measure(url, chosen.key, chosen.prompt, chosen.calibration))
            write(found, chosen.out)
            print(f"{chosen.out}: at most {found.capacity:.1f} images/s for a worker")
        elif chosen.what == "batches":
            print(batches(steady(chosen.fixed, chosen.step, chosen.claim), workers=2))
        elif chosen.what == "plan":
            print(plan(read(chosen.times), chosen.price[0], chosen.p99, chosen.peak))
        else:
            print(cost(chosen.fixed, chosen.step, chosen.steps, chosen.price, chosen.p99, chosen.peak))
    except (FewstepError, RuntimeError, ValueError, OSError) as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "measure", "plan", "cost", "batches"])
    parser.add_argument("--url", help="A running service; without it one is started, as FEWSTEP_ variables say.")
    parser.add_argument("--key", default=None, help="API key.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--rate", type=float, default=5.0, help="Requests a second.")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window", type=float, default=60.0, help="Seconds of open load in each.")
    parser.add_argument("--calibration", type=float, default=10.0, help="Seconds at each of five loads.")
    parser.add_argument("--seed", type=int, default=1, help="Of the arrivals.")
    parser.add_argument("--out", type=Path, default=Path("times.json"))
    parser.add_argument("--times", type=Path, default=Path("times.json"))
    parser.add_argument("--price", type=float, nargs="+", default=[2.5], help="Dollars for a worker's GPU in an hour.")
    parser.add_argument("--p99", type=float, default=2.0, help="Objective in seconds.")
    parser.add_argument("--peak", type=float, default=2.0, help="Busiest hour over the day's mean.")
    parser.add_argument("--fixed", type=float, default=0.03, help="Seconds of one image for text and decoding.")
    parser.add_argument("--step", type=float, default=0.05, help="Seconds of one image for each step.")
    parser.add_argument("--claim", type=float, default=0.0, help="Seconds between two calls (batches).")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    return parser


if __name__ == "__main__":
    sys.exit(main())
