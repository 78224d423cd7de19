"""A canary: two versions draw the same prompts from the same seeds, and a test decides that may be looked at any time.

The difference of a pair is far less uncertain than that of two averages, since prompt and noise are the same. What is
kept are sums over the pairs (finish.lua adds each pair once); the decision is a function of them, so that every HTTP
process may take it, at any moment.

* Means (scores, the logarithm of the slowdown): a confidence sequence, valid at all times together for large samples:
  ``mean ± deviation * sqrt(2 (n r^2 + 1) / (n r)^2 * log(sqrt(n r^2 + 1) / alpha))`` (Waudby-Smith, Arbour, Sinha,
  Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", arXiv 2103.06476).
* Failures: likelihood ratios against the boundary, which are e-values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FEWEST = 50  # pairs before anything is decided: the confidence sequence holds for large samples
TIGHTEST_AT = 500  # pairs at which the confidence sequence is as tight as it can be
REWARD = "reward:"
SLOWDOWN = "slowdown"


class Decision(StrEnum):
    """What is to become of a canary."""

    GO_ON = "running"
    PROMOTE = "promoted"
    ROLL_BACK = "rolled_back"


@dataclass(frozen=True)
class Plan:
    """What a candidate must show. ``margin``: how much worse it may be in the mean of each scorer, in standard
    deviations of the teacher. ``failures``: which share of the pairs may fail with the candidate alone. ``slowdown``:
    how many times as long a call may take. ``alpha``: the chance of a wrong decision of either kind, at most."""

    margin: float = 0.1
    failures: float = 0.02
    slowdown: float = 1.25
    alpha: float = 0.05


@dataclass(frozen=True)
class Canary:
    """A candidate that is compared with the promoted version, or was.

    ``state`` is running, promoted, rolled_back or stopped, ``share`` how much of the base's traffic both draw,
    ``epoch`` the name of its sums. Times are Unix times.
    """

    model: str
    base: str
    candidate: str
    epoch: str
    share: float
    plan: Plan
    state: str = Decision.GO_ON
    reason: str = ""
    started_s: float = 0.0
    ended_s: float | None = None

    @property
    def running(self) -> bool:
        return self.state == Decision.GO_ON


def read_canary(model: str, data: Mapping[str, Any]) -> Canary:
    """A canary as the queue's server keeps it."""
    ended_us = data.get("ended_us")
    return Canary(
        model, data["base"], data["candidate"], data["epoch"], float(data["share"]), Plan(**data["plan"]),
        data["state"], data["reason"], int(data["started_us"]) / 1e6, int(ended_us) / 1e6 if ended_us else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """Of numbers: how many, their sum, and that of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        if self.count < 2:
            return 0.0
        return math.sqrt(max(0.0, (self.squares - self.total * self.mean) / (self.count - 1)))

    def half_width(self, alpha: float) -> float:
        """Half the width of the confidence sequence; infinite before ``FEWEST``."""
        if self.count < FEWEST:
            return math.inf
        r2, n = _tuned(alpha) / TIGHTEST_AT, self.count
        return self.deviation * math.sqrt(2 * (n * r2 + 1) / (n * n * r2) * math.log(math.sqrt(n * r2 + 1) / alpha))


def _tuned(alpha: float) -> float:
    """n r^2 at which the width is least, for a two-sided alpha (the paper's approximation)."""
    return -2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)


@dataclass(frozen=True)
class Sums:
    """Everything that is known of a canary's pairs; failures are of one version alone, or of both."""

    pairs: int = 0
    base_failed: int = 0
    candidate_failed: int = 0
    both_failed: int = 0
    void: int = 0
    means: Mapping[str, Sum] = field(default_factory=dict)

    @property
    def rewards(self) -> dict[str, Sum]:
        return {name.removeprefix(REWARD): row for name, row in self.means.items() if name.startswith(REWARD)}

    @property
    def slowdown(self) -> Sum:
        return self.means.get(SLOWDOWN, Sum())


def read_sums(row: Mapping[str, str]) -> Sums:
    """The sums as finish.lua keeps them."""
    names = {name.rpartition("|")[0] for name in row if "|" in name}
    means = {
        name: Sum(int(row[f"{name}|n"]), float(row[f"{name}|s"]), float(row[f"{name}|q"])) for name in sorted(names)
    }
    counts = ("pairs", "base_failed", "candidate_failed", "both_failed", "void")
    return Sums(**{name: int(row.get(name, 0)) for name in counts}, means=means)


@dataclass(frozen=True)
class Verdict:
    """The decision, and the reason in one sentence."""

    decision: Decision
    reason: str


def judge(sums: Sums, plan: Plan, scorers: frozenset[str] = frozenset()) -> Verdict:
    """What the pairs say so far. ``scorers`` are those that must have spoken before a promotion.

    A candidate is rolled back as soon as one figure is certainly worse: the chance of that for one that is not is
    shared by all figures. It is promoted once every figure is certainly within its margin: each may be wrong by alpha,
    since one that is out of its margin is enough to hold the candidate.
    """
    each = plan.alpha / (len(sums.rewards) + 2)
    if worse := _worse(sums, plan, each):
        return Verdict(Decision.ROLL_BACK, worse)
    if waiting := _waiting(sums, plan, scorers):
        return Verdict(Decision.GO_ON, waiting)
    return Verdict(Decision.PROMOTE, f"no figure is worse by more than its margin, after {sums.pairs} pairs")


def _worse(sums: Sums, plan: Plan, alpha: float) -> str:
    """Which figure is certainly worse; empty if none is."""
    for scorer, row in sums.rewards.items():
        if row.mean + row.half_width(alpha) < 0:
            return f"scores of {scorer} are lower by {-row.mean:.3f} ± {row.half_width(alpha):.3f}"
    discordant = sums.base_failed + sums.candidate_failed
    if sums.candidate_failed > sums.base_failed and coin_evidence(sums.candidate_failed, discordant) >= 1 / alpha:
        return f"{sums.candidate_failed} pictures failed with it alone, and {sums.base_failed} with the other alone"
    slow = sums.slowdown
    if slow.mean - slow.half_width(alpha) > math.log(plan.slowdown):
        return f"a call takes {math.exp(slow.mean):.2f} times as long"
    return ""


def _waiting(sums: Sums, plan: Plan, scorers: frozenset[str]) -> str:
    """What is not certain yet; empty if everything is."""
    if sums.pairs < FEWEST:
        return f"{sums.pairs} pairs of {FEWEST} at least"
    if missing := sorted(scorers - sums.rewards.keys()):
        return f"nothing was scored by {missing[0]} yet"
    for scorer, row in sums.rewards.items():
        if not row.mean - row.half_width(plan.alpha) > -plan.margin:
            return f"scores of {scorer} may still be lower by more than {plan.margin:g}"
    if share_evidence(sums.candidate_failed, sums.pairs, plan.failures) < 1 / plan.alpha:
        return f"more than {plan.failures:.0%} of its pictures may still fail"
    return ""


def coin_evidence(heads: int, tosses: int) -> float:
    """An e-value against a fair coin: the likelihood under a uniform prior over that of the fair one."""
    log_beta = math.lgamma(heads + 1) + math.lgamma(tosses - heads + 1) - math.lgamma(tosses + 2)
    return math.exp(min(700.0, tosses * math.log(2) + log_beta))


def share_evidence(events: int, trials: int, share: float) -> float:
    """An e-value against events of this share or more: the likelihood of a quarter of it over that of the share."""
    less = share / 4
    log = (trials - events) * math.log((1 - less) / (1 - share)) + events * math.log(less / share)
    return math.exp(min(700.0, log))
