"""A canary's sums and decisions: closed forms, small simulations with known answers, the server's own arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from benchmarks.canary_simulation import Candidate, World, simulate
from service.models.registry import ModelRegistry, ModelState
from service.quality.canary import (
    FEWEST,
    Decision,
    Plan,
    Sum,
    Sums,
    Verdict,
    coin_evidence,
    judge,
    read_sums,
    share_evidence,
)
from tests.service.support import Queue

PLAN, BOTH = Plan(), frozenset({"trained", "heldout"})


def of(values: Any) -> Sum:
    return Sum(len(values), float(np.sum(values)), float(np.sum(np.square(values))))


def sums(count: int = 1000, difference: float = 0.0, slow: float = 1.0, deviation: float = 0.1, **counts: int) -> Sums:
    """Pairs of exactly this mean and deviation in each figure."""
    wave = np.resize([1.0, -1.0], count) * deviation
    means = {f"reward:{name}": of(wave + difference) for name in sorted(BOTH)}
    return Sums(pairs=count, means={**means, "slowdown": of(wave + math.log(slow))}, **counts)


def test_mean_deviation_and_width_against_their_definitions() -> None:
    values = np.array([0.5, -0.25, 1.0, 0.75] * 20)
    row = of(values)
    assert (row.mean, row.deviation) == (pytest.approx(0.5), pytest.approx(float(np.std(values, ddof=1))))
    r2 = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 500
    inner = 2 * (80 * r2 + 1) / (80**2 * r2) * math.log(math.sqrt(80 * r2 + 1) / 0.05)
    assert row.half_width(0.05) == pytest.approx(row.deviation * math.sqrt(inner))
    assert of(values[: FEWEST - 1]).half_width(0.05) == math.inf


def test_the_evidence_about_failures_against_its_integral() -> None:
    """A uniform mixture over the chance of heads, integrated numerically; and its expectation under a fair coin."""
    p = (np.arange(100_000) + 0.5) / 100_000
    for heads, tosses in ((0, 0), (3, 3), (9, 10), (4, 10)):
        assert coin_evidence(heads, tosses) == pytest.approx(
            np.mean(p**heads * (1 - p) ** (tosses - heads)) * 2**tosses
        )
    expected = sum(math.comb(12, k) / 2**12 * coin_evidence(k, 12) for k in range(13))
    assert expected == pytest.approx(1.0)
    expected = sum(math.comb(50, k) * 0.02**k * 0.98 ** (50 - k) * share_evidence(k, 50, 0.02) for k in range(51))
    assert expected == pytest.approx(1.0)
    assert share_evidence(0, 197, 0.02) < 20 < share_evidence(0, 200, 0.02)  # so many clean pairs it takes


@pytest.mark.parametrize(
    ("found", "decision", "reason"),
    [
        (sums(), Decision.PROMOTE, "no figure is worse by more than its margin, after 1000 pairs"),
        (sums(difference=0.05), Decision.PROMOTE, "no figure"),
        (sums(difference=-0.05), Decision.ROLL_BACK, "scores of heldout are lower by 0.050 ± "),
        (sums(FEWEST - 1), Decision.GO_ON, "49 pairs of 50 at least"),
        (sums(60, deviation=0.5), Decision.GO_ON, "scores of heldout may still be lower by more than 0.1"),
        (sums(100), Decision.GO_ON, "more than 2% of its pictures may still fail"),
        (sums(candidate_failed=12), Decision.ROLL_BACK, "12 pictures failed with it alone, and 0 with the other"),
        (sums(base_failed=40), Decision.PROMOTE, "no figure is worse by more than its margin"),
        (sums(candidate_failed=12, base_failed=12), Decision.GO_ON, "more than 2% of its pictures may still fail"),
        (sums(slow=1.5), Decision.ROLL_BACK, "a call takes 1.50 times as long"),
        (sums(slow=1.2), Decision.PROMOTE, "no figure"),
    ],
)
def test_what_is_decided_and_why(found: Sums, decision: Decision, reason: str) -> None:
    verdict = judge(found, PLAN, BOTH)
    assert verdict.decision is decision and verdict.reason.startswith(reason), verdict


@pytest.mark.parametrize("odd", sorted(BOTH))
def test_one_scorer_is_enough_to_roll_back_and_to_hold_a_candidate(odd: str) -> None:
    wave = np.resize([1.0, -1.0], 1000)

    def decided(mean: float, deviation: float) -> tuple[Decision, str]:
        means = {f"reward:{name}": of(0.1 * wave) for name in sorted(BOTH)}
        means |= {f"reward:{odd}": of(deviation * wave + mean)}
        verdict = judge(Sums(pairs=1000, means=means), PLAN, BOTH)
        return verdict.decision, verdict.reason

    worse, unsure, fine = decided(-0.05, 0.1), decided(0.0, 2.0), decided(0.05, 0.1)
    assert worse[0] is Decision.ROLL_BACK and worse[1].startswith(f"scores of {odd} are lower by 0.050 ± ")
    assert unsure == (Decision.GO_ON, f"scores of {odd} may still be lower by more than 0.1")
    assert fine[0] is Decision.PROMOTE, "no time is known: it holds nobody up"


@pytest.mark.parametrize(("of_width", "rolled_back"), [(0.99, False), (1.01, True)])
def test_the_chance_of_a_wrong_rollback_is_shared_by_all_figures(of_width: float, rolled_back: bool) -> None:
    """Two scorers, failures and time: a quarter of alpha each."""
    width = sums().rewards["trained"].half_width(PLAN.alpha / 4)
    verdict = judge(sums(difference=-of_width * width), PLAN, BOTH)
    assert (verdict.decision is Decision.ROLL_BACK) is rolled_back


@pytest.mark.parametrize(("failed", "rolled_back"), [(9, False), (10, True)])
def test_how_many_failures_of_the_candidate_alone_are_too_many(failed: int, rolled_back: bool) -> None:
    """The evidence is 2^n / (n + 1), and 4 / 0.05 = 80 lies between those of 9 and of 10."""
    assert coin_evidence(9, 9) == pytest.approx(51.2) and coin_evidence(10, 10) == pytest.approx(1024 / 11)
    assert (judge(sums(candidate_failed=failed), PLAN, BOTH).decision is Decision.ROLL_BACK) is rolled_back


def test_nothing_is_promoted_that_a_scorer_has_not_spoken_of() -> None:
    silent = Sums(pairs=1000, means={"reward:trained": of(np.resize([0.1, -0.1], 1000))})
    assert judge(silent, PLAN, BOTH) == Verdict(Decision.GO_ON, "nothing was scored by heldout yet")


@pytest.mark.parametrize(
    ("candidate", "right"),
    [
        (Candidate("better", 0.1), Decision.PROMOTE),
        (Candidate("equal"), Decision.PROMOTE),
        (Candidate("worse", -0.25), Decision.ROLL_BACK),
        (Candidate("fails", failures=0.08), Decision.ROLL_BACK),
        (Candidate("slow", slowdown=1.8), Decision.ROLL_BACK),
    ],
)
def test_a_canary_decides_rightly_and_sooner_than_unpaired(candidate: Candidate, right: Decision) -> None:
    found = [simulate(candidate, World(), PLAN, True, 3000, seed) for seed in range(20)]
    assert sum(one.decision is right for one in found) >= 19  # each is wrong with a chance of 5 % at most
    if candidate.shift:
        unpaired = [simulate(candidate, World(), PLAN, False, 6000, seed) for seed in range(5)]
        assert np.median([one.pairs for one in found]) < np.median([one.pairs for one in unpaired])


class Registered:
    """A model of which version 1 is the latest and version 2 is served, and a canary of it."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.registry = ModelRegistry(queue.async_client, queue.model)
        run = queue.runner.run
        serving = {
            f"{queue.model}/{version}": {"state": ModelState.SERVING, "attempt": "", "reason": ""} for version in "12"
        }
        run(self.registry._run("init", json.dumps(serving), json.dumps({queue.model: "1"})))

    def start(self, version: str = "2") -> str:
        return self.queue.runner.run(self.registry.start_canary(self.queue.model, version, 0.5, PLAN))

    @property
    def canary(self) -> Any:
        return self.queue.runner.run(self.registry.read()).canaries[self.queue.model]

    @property
    def latest(self) -> str:
        return self.queue.runner.run(self.registry.read()).promoted[self.queue.model]

    def end(self, state: str, reason: str = "r", canary: Any = None) -> str:
        return self.queue.runner.run(self.registry.end_canary(canary or self.canary, state, reason))

    def sums(self) -> Sums:
        return self.queue.runner.run(self.registry.sums(self.canary))

    def half(self, pair: str, side: str, epoch: str = "") -> str:
        """One half, enqueued."""
        version = "1" if side == "base" else "2"
        name = f"{self.queue.model}|{epoch or self.canary.epoch}|{pair}|{side}"
        return self.queue.add(version=version, pair=name)

    def finish(self, id: str, reward: float = 0.0, state: str = "done", call_s: float = 1.0, batch: int = 1) -> str:
        worker = self.queue.consumer("w")
        lanes = {f"3|{self.queue.model}|{version}": 1 for version in "12"}
        (claimed,) = worker.claim(lanes)
        assert claimed.id == id
        notes = {"half": {"rewards": {"trained": reward}, "call_s": call_s, "batch": batch}} if state == "done" else {}
        result = {"images": []} if state == "done" else {"error": {"code": "generation_failed", "message": "m"}}
        assert worker.finish(id, claimed.token, state, result, notes=notes) == state
        assert (
            worker.finish(id, claimed.token, state, result, notes=notes) == state
        )  # the answer was lost: nothing twice
        return claimed.token


@pytest.fixture
def registered(queue: Queue) -> Registered:
    return Registered(queue)


def test_a_canary_is_started_once_against_the_latest_version(registered: Registered) -> None:
    assert registered.start("3") == "missing" and registered.start("1") == "latest"
    assert registered.start() == "ok" and registered.start() == "running"
    canary = registered.canary
    assert (canary.base, canary.candidate, canary.share, canary.plan, canary.state) == ("1", "2", 0.5, PLAN, "running")
    assert canary.running and canary.started_s > 1e9 and canary.ended_s is None and asdict(canary.plan) == asdict(PLAN)


def test_it_ends_once_whoever_says_so_first(registered: Registered) -> None:
    registered.start()
    canary = registered.canary
    assert registered.end("rolled_back", "worse", canary) == "rolled_back"
    assert registered.end("promoted", "better", canary) == "rolled_back" and registered.latest == "1"
    assert (registered.canary.state, registered.canary.reason) == ("rolled_back", "worse")
    assert registered.start() == "ok" and registered.end("promoted", "late", canary) == "missing"
    assert registered.end("promoted", "better") == "promoted" and registered.latest == "2"


def test_a_candidate_that_is_gone_is_not_promoted(registered: Registered) -> None:
    registered.start()
    name = f"{registered.queue.model}/2"
    assert registered.queue.runner.run(registered.registry.unload(name)) == "ok"
    assert registered.end("promoted") == "stopped" and registered.latest == "1"


def test_every_pair_is_added_once_whichever_half_comes_first(registered: Registered) -> None:
    registered.start()
    registered.finish(registered.half("a", "base"), 0.5, call_s=2.0)
    assert registered.sums().pairs == 0
    registered.finish(registered.half("a", "candidate"), 0.25, call_s=3.0)
    registered.finish(registered.half("b", "candidate"), 2.0, batch=2)
    registered.finish(registered.half("b", "base"), 1.0, batch=1)  # other batches: their times say nothing
    found = registered.sums()
    assert found.pairs == 2 and found.rewards == {"trained": Sum(2, 0.75, 0.0625 + 1.0)}
    assert found.slowdown == Sum(1, pytest.approx(math.log(1.5)), pytest.approx(math.log(1.5) ** 2))
    assert registered.queue.client.exists(f"{registered.queue.prefix}cp:{registered.canary.epoch}") == 0


def test_failures_are_counted_by_who_failed_alone(registered: Registered) -> None:
    registered.start()
    for pair, base, candidate in (("a", "failed", "done"), ("b", "done", "failed"), ("c", "failed", "failed")):
        registered.finish(registered.half(pair, "base"), state=base)
        registered.finish(registered.half(pair, "candidate"), state=candidate)
    found = registered.sums()
    assert (found.pairs, found.base_failed, found.candidate_failed, found.both_failed) == (3, 1, 1, 1)
    assert found.means == {}


def test_a_worker_that_dies_with_a_half_counts_as_its_failure_only_when_the_job_is_given_up(
    registered: Registered,
) -> None:
    registered.start()
    registered.finish(registered.half("a", "base"))
    id = registered.half("a", "candidate")
    lanes = {f"3|{registered.queue.model}|2": 1}
    for k in range(registered.queue.limits["max_attempts"]):
        assert registered.sums().pairs == 0
        worker = registered.queue.consumer(f"w{k}")
        assert [one.id for one in worker.claim(lanes)] == [id]
        worker.lost(f"w{k}")
    assert registered.queue.state(id) == "failed" and registered.sums().candidate_failed == 1


@pytest.mark.parametrize("first", ["base", "candidate"])
def test_a_half_that_is_given_up_takes_its_pair_away(registered: Registered, first: str) -> None:
    registered.start()
    other = "candidate" if first == "base" else "base"
    registered.queue.cancel(registered.half("a", first))
    registered.finish(registered.half("a", other))
    registered.finish(registered.half("b", other))
    registered.queue.cancel(registered.half("b", first))
    assert (registered.sums().pairs, registered.sums().void) == (0, 2)


@pytest.mark.parametrize("lost", [False, True])
def test_where_scores_come_later_a_half_counts_with_its_scores(registered: Registered, lost: bool) -> None:
    registered.start()
    registered.finish(registered.half("a", "base"), 0.5)
    id = registered.half("a", "candidate")
    worker = registered.queue.consumer("w")
    (claimed,) = worker.claim({f"3|{registered.queue.model}|2": 1})
    assert worker.finish(id, claimed.token, "done", {"images": []}, scores_follow=True) == "done"
    assert registered.sums() == Sums()
    if lost:
        worker.lost("w")
        assert (registered.sums().pairs, registered.sums().void) == (0, 1)
    else:
        notes = {"half": {"rewards": {"trained": 0.75}, "call_s": 1.0, "batch": 1}}
        assert [worker.score(id, claimed.token, {"images": []}, notes) for _ in range(2)] == ["done", "done"]
        assert registered.sums().rewards == {"trained": Sum(1, 0.25, 0.0625)}


def test_what_belongs_to_an_earlier_canary_counts_no_more(registered: Registered) -> None:
    registered.start()
    epoch = registered.canary.epoch
    registered.end("stopped")
    registered.start()
    for side in ("base", "candidate"):
        registered.finish(registered.half("a", side, epoch))
    assert registered.sums() == Sums()


def test_the_sums_are_read_as_they_are_kept() -> None:
    row = {"pairs": "3", "candidate_failed": "1", "reward:a|n": "2", "reward:a|s": "0.5", "reward:a|q": "0.25"}
    assert read_sums(row) == Sums(3, 0, 1, 0, 0, {"reward:a": Sum(2, 0.5, 0.25)})
