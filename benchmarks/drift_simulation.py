"""``python -m benchmarks.drift_simulation``: how often the drift test is wrong, and how soon it is right.

``--bundle models/shapes`` takes scores that are spread as that student's own, and the size of its own reference.

Every repetition measures a reference of its own, of so many prompts, from a distribution of scores; then it serves
months without a drift, and after a while of that a drift of a tenth of a standard deviation (and others). It is the
test's own arithmetic (``service.quality.drift``) on arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from service.quality.drift import CAP, EVERY, UNKNOWN_COUNT, Observation, factors, observe, threshold
from student.bundle import RewardReference, read_student
from student.reference import distribution

Floats = NDArray[np.float64]
Scores = Callable[[np.random.Generator, int], Floats]
SCORERS = 2
CLEAN = 10_000  # observations before a drift begins
BLOCK = 10_000


def normal(gen: np.random.Generator, count: int) -> Floats:
    return gen.normal(size=count)


def skewed(gen: np.random.Generator, count: int) -> Floats:
    """Most near the top and a long tail of bad ones, as the starter student's; of mean 0 and deviation 1."""
    return -(gen.exponential(size=count) - 1.0)


DISTRIBUTIONS: dict[str, Scores] = {"normal": normal, "skewed": skewed}


def spread_as(reference: RewardReference) -> Scores:
    """Between its percentiles evenly, in its standard deviations."""
    points = sorted((float(point) / 100, value) for point, value in reference.percentiles.items())
    shares, values = (np.array(column) for column in zip(*points, strict=True))

    def draw(gen: np.random.Generator, count: int) -> Floats:
        return np.interp(gen.random(count), shares, values / reference.std)

    return draw


def of_bundle(bundle: Path) -> tuple[dict[str, Scores], list[int]]:
    """The distribution of each scorer at each step count, and how many prompts they were measured on."""
    known = {
        f"{name} {key}": row
        for name, reference in read_student(bundle).reward_reference.items()
        for key, row in (reference.at or {}).items()
    }
    return {name: spread_as(row) for name, row in known.items()}, sorted(
        {row.count or UNKNOWN_COUNT for row in known.values()}
    )


@dataclass(frozen=True)
class Table:
    """A reference as arrays: the part of it that a score falls into, and each bet's factor there."""

    edges: Floats
    factors: Floats

    @staticmethod
    def of(reference: RewardReference) -> Table:
        edges = sorted(value for point, value in reference.percentiles.items() if 0 < float(point) < 100)
        inside = [edges[0] - 1, *[(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)], edges[-1] + 1]
        seen = [observe(reference, [score]) for score in inside]
        return Table(np.array(edges), np.array([factors(reference, one or Observation(0, 0, 0)) for one in seen]))


def references(scores: Scores, size: int, repetitions: int, seed: int) -> list[Table]:
    """One for each repetition; ``size`` 0 is a reference without an error."""
    gen = np.random.default_rng([seed, size])
    if size == 0:
        exact = distribution(list(scores(gen, 2_000_000)), prompts=10**12)
        exact = RewardReference(exact.mean, exact.std, exact.percentiles, count=10**12)
        return [Table.of(exact)] * repetitions
    return [Table.of(distribution(list(scores(gen, size)))) for _ in range(repetitions)]


def alarms(tables: list[Table], draw: Callable[[int, int], Floats], length: int) -> NDArray[np.int64]:
    """After how many observations each repetition raises its first alarm; ``length`` where it never does.

    ``draw(first, count)`` gives scores (repetitions, count).
    """
    limit, cap = threshold(SCORERS), CAP * threshold(SCORERS)
    rows = np.arange(len(tables))
    by = np.stack([table.factors for table in tables])
    e = np.zeros((len(tables), by.shape[2]))
    found = np.full(len(tables), length)
    for first in range(0, length, BLOCK):
        block = draw(first, min(BLOCK, length - first))
        parts = np.stack([np.searchsorted(t.edges, row, side="right") for t, row in zip(tables, block, strict=True)])
        for k in range(block.shape[1]):
            e = np.minimum(cap, (e + 1) * by[rows, parts[:, k]])
            fresh = (e.mean(axis=1) >= limit) & (found == length)
            found[fresh] = first + k + 1
        if (found < length).all():
            break
    return found


def drawer(scores: Scores, repetitions: int, seed: int, shift: float, clean: int) -> Callable[[int, int], Floats]:
    """Scores that lose ``shift`` after ``clean`` observations."""

    def draw(first: int, count: int) -> Floats:
        gen = np.random.default_rng([seed, first])
        block = scores(gen, repetitions * count).reshape(repetitions, count)
        drifted: Any = np.arange(first, first + count) >= clean
        return block - shift * drifted

    return draw


def run(
    months: Annotated[int, typer.Option(help="Months without a drift, of 300,000 observations each.")] = 100,
    repetitions: Annotated[int, typer.Option(help="Drifts of each kind.")] = 100,
    sizes: Annotated[
        str, typer.Option(help="Prompts of the reference; 0: without an error.")
    ] = "256,1024,4096,16384,0",
    shifts: Annotated[str, typer.Option(help="Standard deviations by which scores fall.")] = "0.1,0.25,0.5",
    longest: Annotated[int, typer.Option(help="Observations after which a drift counts as not found.")] = 100_000,
    bundle: Annotated[Path | None, typer.Option(help="A student whose own distributions and size are taken.")] = None,
) -> None:
    """Print false alarms a month, and the observations until a drift is found, by the reference's size."""
    distributions, counts = of_bundle(bundle) if bundle else (DISTRIBUTIONS, list(map(int, sizes.split(","))))
    print(f"{'scores':10} {'reference':>9} {'false alarms a month':>21}   shift: observations, median (90 %)")
    for name, scores in distributions.items():
        for size in counts:
            tables = references(scores, size, months, 1)
            false = (alarms(tables, drawer(scores, months, 2, 0.0, 0), EVERY) < EVERY).mean()
            found = []
            for shift in map(float, shifts.split(",")):
                tables = references(scores, size, repetitions, 3)
                first = alarms(tables, drawer(scores, repetitions, 4, shift, CLEAN), CLEAN + longest) - CLEAN
                median, most = np.percentile(first, [50, 90])
                share = (first < longest).mean()
                report = f"{median:,.0f} ({most:,.0f})" if share >= 0.9 else f"found by {share:.0%}"
                found.append(f"{shift}: {report}")
            print(f"{name:10} {size or 'exact':>9} {false:>21.3f}   {'; '.join(found)}", flush=True)


if __name__ == "__main__":
    typer.run(run)
