"""Whether the served scores are still those of the student's reference: a sequential test, and whose fault it is.

What is looked at is where a score stands in the reference, not the score itself: its rank (0 to 1, by the reference's
own percentiles), and whether it is below the 5th. Both have known means as long as nothing has drifted, whatever the
scores' distribution, and both are bounded, so that betting on them is fair: ``1 + bet * (rank - 1/2)`` has the mean 1.
Several bets (up and down, small and large) are each the Shiryaev-Roberts sum of an e-detector: ``e = (e + 1) *
factor``. Without drift its expectation grows by 1 an observation, so that the mean of the detectors takes, on average,
at least N observations to reach N, however often anybody looks (Shin, Ramdas, Rinaldo, E-detectors, arXiv 2203.03532).

A reference is itself a sample. What lies within three of its standard errors of the known mean counts as no drift: the
bets are placed beyond that margin, and so a small reference finds large drifts only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from student.bundle import RewardReference
from student.probe import Outcome

EVERY = 300_000  # observations to a false alarm of one student, on average at least: a month of 10,000 a day
MARGIN_ERRORS = 3.0  # standard errors of the reference that count as no drift
UNKNOWN_COUNT = 100  # pictures that a reference is taken to be made of which does not say it
LOW = "5"  # the percentile below which a picture is low
RANK_BETS = (-1.2, -0.4, -0.15, 0.15, 0.4, 1.2)
LOW_BETS = (0.5, 2.0, 6.0)
CAP = 10.0  # times the threshold: what an evidence can reach, so that it falls soon after the cause is gone
RECENT = 1000  # observations that the shown means look back on

Cause = Literal["engine", "scorer", "model", "prompts", "unknown"]


@dataclass(frozen=True)
class Observation:
    """What one job's pictures say, by one scorer: means of the score, of the rank and of being low, over them."""

    score: float
    rank: float
    low: float


def observe(reference: RewardReference, scores: Sequence[float]) -> Observation | None:
    """The observation of a job's scores (one or more); None where the reference has no percentiles to rank by.

    Pictures of one prompt are alike, so that they count as one observation.
    """
    edges = _edges(reference)
    if edges is None:
        return None
    ranks = [_rank(edges, score) for score in scores]
    lows = [float(score < reference.percentiles[LOW]) for score in scores]
    count = len(scores)
    return Observation(math.fsum(scores) / count, math.fsum(ranks) / count, math.fsum(lows) / count)


def factors(reference: RewardReference, seen: Observation) -> list[float]:
    """What each bet becomes by an observation: ``RANK_BETS``, then ``LOW_BETS``; each is above 0."""
    count = reference.count or UNKNOWN_COUNT
    edges = _edges(reference)
    assert edges is not None
    spread = math.sqrt(sum(share * ((low + high) / 2 - 0.5) ** 2 for low, high, share in _parts(edges)))
    margin = MARGIN_ERRORS * spread / math.sqrt(count)
    share = float(LOW) / 100
    low_margin = MARGIN_ERRORS * math.sqrt(share * (1 - share) / count)
    ranks = [1 + bet * (seen.rank - 0.5 - math.copysign(margin, bet)) for bet in RANK_BETS]
    return [*ranks, *(1 + bet * (seen.low - share - low_margin) for bet in LOW_BETS)]


def threshold(scorers: int, every: float = EVERY) -> float:
    """What the evidence of one scorer must reach, where so many are watched."""
    return every * max(1, scorers)


def step(detectors: Sequence[float], by: Sequence[float], cap: float) -> list[float]:
    """The detectors after an observation; the same arithmetic as in finish.lua."""
    before = list(detectors) or [0.0] * len(by)
    return [min(cap, (e + 1) * factor) for e, factor in zip(before, by, strict=True)]


@dataclass(frozen=True)
class Stream:
    """What is known of one model, version, step count, size and scorer; ``selected`` pictures were chosen by a score.

    ``mean`` and ``low_share`` are of the newest observations. ``evidence`` is in thresholds: 1 or more is an alarm.
    """

    model: str
    version: str
    steps: int
    size: str
    scorer: str
    selected: bool
    count: int
    mean: float
    low_share: float
    evidence: float = 0.0
    direction: str = ""

    @property
    def drifts(self) -> bool:
        return self.evidence >= 1


def stream_key(model: str, version: str, steps: int, size: str, scorer: str, selected: bool) -> str:
    """The name of a stream in the queue's hash."""
    return f"{model}/{version}|{steps}|{size}|{scorer}|{'selected' if selected else 'raw'}"


def read_stream(key: str, state: Mapping[str, Any]) -> Stream:
    """A stream from its name and from what finish.lua keeps of it."""
    name, steps, size, scorer, kind = key.split("|")
    model, _, version = name.partition("/")
    detectors = [float(e) for e in state.get("e") or ()]
    limit = float(state.get("limit") or 0.0)
    evidence = math.fsum(detectors) / len(detectors) / limit if detectors and limit else 0.0
    return Stream(
        model, version, int(steps), size, scorer, kind == "selected", int(state["n"]), float(state["mean"]),
        float(state["low"]), evidence, _direction(detectors),
    )  # fmt: skip


def _direction(detectors: Sequence[float]) -> str:
    """Which bet has won most: 'lower', 'higher' or 'more low ones'."""
    if not detectors:
        return ""
    best = max(range(len(detectors)), key=lambda k: detectors[k])
    if best >= len(RANK_BETS):
        return "more low ones"
    return "lower" if RANK_BETS[best] < 0 else "higher"


@dataclass(frozen=True)
class Probes:
    """What the last golden probes found, by ``model/version``: each outcome that a worker tells of."""

    outcomes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def of(self, stream: Stream) -> frozenset[str]:
        return self.outcomes.get(f"{stream.model}/{stream.version}", frozenset())


def cause(stream: Stream, probes: Probes, others: Iterable[Stream]) -> Cause:
    """Whose fault a drift is.

    The engine's if a worker draws other bits than before, the scorer's if the same bits have other scores. If neither
    has changed, pictures are the same function of prompts as ever: then it is the model if another version of it, in
    use at the same time, does not drift (its reference holds for these prompts, this one's does not), else the prompts.
    """
    found = probes.of(stream)
    if found & {Outcome.PIXELS_CHANGED, Outcome.FAILED}:
        return "engine"
    if Outcome.SCORES_CHANGED in found:
        return "scorer"
    if not found & {Outcome.SAME, Outcome.RECORDED}:
        return "unknown"
    alike = [other for other in others if _comparable(stream, other)]
    return "model" if any(not other.drifts for other in alike) else "prompts"


def _comparable(stream: Stream, other: Stream) -> bool:
    """Whether another version's stream has seen enough of the same traffic to drift too, if that were the reason."""
    same = (stream.model, stream.steps, stream.size, stream.scorer, stream.selected) == (
        other.model, other.steps, other.size, other.scorer, other.selected,
    )  # fmt: skip
    return same and stream.version != other.version and other.count >= RECENT


Edges = tuple[tuple[float, float], ...]  # (score, share below it), rising


def _edges(reference: RewardReference) -> Edges | None:
    """The reference's inner percentile points; outside of them nothing is known."""
    points = sorted((float(p) / 100, value) for p, value in reference.percentiles.items() if 0 < float(p) < 100)
    return tuple((value, share) for share, value in points) if LOW in reference.percentiles else None


def _rank(edges: Edges, score: float) -> float:
    """The middle of the part of the reference that a score falls into: its mean is 1/2, whatever lies inside a part."""
    low, high = 0.0, 1.0
    for value, share in edges:
        if score < value:
            high = share
            break
        low = share
    return (low + high) / 2


def _parts(edges: Edges) -> list[tuple[float, float, float]]:
    """(from, to, share) of each part."""
    shares = [0.0, *(share for _, share in edges), 1.0]
    return [(low, high, high - low) for low, high in zip(shares, shares[1:], strict=False)]
