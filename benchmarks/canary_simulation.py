"""``python -m benchmarks.canary_simulation``: what a canary decides, how often wrongly, and after how many pairs.

Every repetition looks after each pair, as the service does twice a second. Beside it the same decision from unpaired
pictures, where either version draws prompts of its own: as many pictures for each version as there are pairs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from service.quality.canary import REWARD, SLOWDOWN, Decision, Plan, Sum, Sums, judge

SCORERS = ("trained", "heldout")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """``shift`` of the mean score; ``failures``: share that fails with it alone; ``slowdown`` of its calls."""

    name: str
    shift: float = 0.0
    failures: float = 0.0
    slowdown: float = 1.0


CANDIDATES = (
    Candidate("better by 0.1", 0.1),
    Candidate("equal"),
    Candidate("worse by 0.05", -0.05),
    Candidate("worse by 0.1, the margin", -0.1),
    Candidate("worse by 0.25", -0.25),
    Candidate("fails in 5 %", failures=0.05),
    Candidate("takes 1.6 times as long", slowdown=1.6),
)


@dataclass(frozen=True)
class World:
    """Standard deviations: of a score over prompts, of the difference of a pair, of the logarithm of a call's time."""

    score: float = 0.8
    difference: float = 0.35
    log_time: float = 0.3
    failures: float = 0.002


@dataclass(frozen=True)
class Outcome:
    decision: Decision
    pairs: int


def simulate(candidate: Candidate, world: World, plan: Plan, paired: bool, longest: int, seed: int) -> Outcome:
    """One canary, judged after each pair."""
    gen = np.random.default_rng(seed)
    differences = {name: _differences(gen, candidate, world, paired, longest) for name in SCORERS}
    logs = gen.normal(np.log(candidate.slowdown), np.sqrt(2) * world.log_time, longest)
    failed = np.stack([gen.random(longest) < world.failures, gen.random(longest) < world.failures + candidate.failures])
    both_well = ~failed.any(axis=0)
    rows = {f"{REWARD}{name}": np.where(both_well, values, 0.0) for name, values in differences.items()}
    rows[SLOWDOWN] = np.where(both_well, logs, 0.0)
    counts = np.cumsum(both_well)
    totals = {name: (np.cumsum(values), np.cumsum(values**2)) for name, values in rows.items()}
    base_failed, candidate_failed = np.cumsum(failed[0] & ~failed[1]), np.cumsum(failed[1] & ~failed[0])
    for k in range(longest):
        means = {name: Sum(int(counts[k]), float(s[k]), float(q[k])) for name, (s, q) in totals.items()}
        sums = Sums(k + 1, int(base_failed[k]), int(candidate_failed[k]), 0, 0, means)
        verdict = judge(sums, plan, frozenset(SCORERS))
        if verdict.decision is not Decision.GO_ON:
            return Outcome(verdict.decision, k + 1)
    return Outcome(Decision.GO_ON, longest)


def _differences(gen: np.random.Generator, candidate: Candidate, world: World, paired: bool, longest: int) -> Floats:
    if paired:  # skewed, as rewards are: most pairs differ little, some very much
        size = gen.exponential(world.difference / np.sqrt(2), longest)
        return candidate.shift + size * gen.choice([-1.0, 1.0], longest)
    base, other = gen.exponential(world.score, (2, longest))
    return candidate.shift + base - other


def run(
    repetitions: Annotated[int, typer.Option(help="Canaries of each kind.")] = 200,
    longest: Annotated[int, typer.Option(help="Pairs after which a canary counts as undecided.")] = 20_000,
    share: Annotated[float, typer.Option(help="Share of the traffic, for the days that it takes.")] = 0.05,
    daily: Annotated[int, typer.Option(help="Requests a day.")] = 10_000,
) -> None:
    """Print decisions and pairs, paired beside unpaired."""
    world, plan = World(), Plan()
    print(f"{world}, {plan}")
    for candidate in CANDIDATES:
        for paired in (True, False):
            found = [simulate(candidate, world, plan, paired, longest, seed) for seed in range(1, repetitions + 1)]
            words = Counter(one.decision for one in found)
            median, most = np.percentile([one.pairs for one in found], [50, 90])
            report = ", ".join(f"{word} {words[word] / repetitions:.1%}" for word in Decision)
            how = "paired" if paired else "unpaired"
            days = median / (share * daily)
            print(
                f"{candidate.name:25} {how:9} {report}; pairs: {median:,.0f} ({most:,.0f}), {days:.1f} days", flush=True
            )


if __name__ == "__main__":
    typer.run(run)
