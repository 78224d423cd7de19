"""A canary's registration and its pairs where the two sides differ in what they say: on a real server."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from service.models.registry import Entry, ModelRegistry, ModelState, ModelStates
from service.quality.canary import Plan, Sum
from tests.service.quality.test_canary import Registered
from tests.service.support import Queue

MONTH_S = 4 * 7 * 86_400


@pytest.fixture
def registered(queue: Queue) -> Registered:
    return Registered(queue)


def finish(registered: Registered, id: str, half: dict[str, Any] | None) -> None:
    """The next job is done with what its worker notes of this half."""
    worker = registered.queue.consumer("w")
    [claimed] = worker.claim({f"3|{registered.queue.model}|{version}": 1 for version in "12"})
    notes = {"half": half} if half else {}
    assert claimed.id == id and worker.finish(id, claimed.token, "done", {"images": []}, notes=notes) == "done"


def pair(registered: Registered, name: str, base: dict[str, Any] | None, candidate: dict[str, Any] | None) -> None:
    for side, half in (("base", base), ("candidate", candidate)):
        finish(registered, registered.half(name, side), half)


def half(call_s: float = 1.0, batch: int = 1, **rewards: float) -> dict[str, Any]:
    return {"rewards": rewards, "call_s": call_s, "batch": batch}


def test_only_scorers_of_both_sides_are_compared_and_each_by_itself(registered: Registered) -> None:
    registered.start()
    pair(registered, "a", half(trained=1.0, old=5.0), half(trained=1.5, new=7.0, heldout=2.0))
    pair(registered, "b", half(trained=1.0, heldout=0.5), half(trained=0.75, heldout=1.0))
    found = registered.sums()
    assert found.pairs == 2
    assert found.rewards == {"trained": Sum(2, 0.25, 0.25 + 0.0625), "heldout": Sum(1, 0.5, 0.25)}


@pytest.mark.parametrize(("base_s", "candidate_s"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_call_whose_time_is_unknown_slows_nothing_down(
    registered: Registered, base_s: float, candidate_s: float
) -> None:
    registered.start()
    pair(registered, "a", half(base_s, trained=1.0), half(candidate_s, trained=1.0))
    found = registered.sums()
    assert found.pairs == 1 and set(found.means) == {"reward:trained"}


def test_a_half_that_is_done_and_says_nothing_voids_its_pair(registered: Registered) -> None:
    """Of an older release, or unscored: never taken for a pair of equals."""
    registered.start()
    pair(registered, "a", None, half(trained=1.0))
    pair(registered, "b", half(trained=1.0), None)
    assert (registered.sums().pairs, registered.sums().void) == (0, 2)


def test_sums_and_open_halves_are_kept_for_four_weeks(registered: Registered) -> None:
    registered.start()
    pair(registered, "a", half(trained=1.0), half(trained=1.0))
    finish(registered, registered.half("b", "base"), half(trained=1.0))
    epoch = registered.canary.epoch
    kept = [registered.queue.client.ttl(f"{registered.queue.prefix}{name}:{epoch}") for name in ("cs", "cp")]
    assert all(MONTH_S - 60 < kept_s <= MONTH_S for kept_s in kept), kept


@pytest.mark.parametrize("named", ["", "nonsense", "m|e|p", "m|e|p|base|more"])
def test_a_pair_that_is_named_as_nobody_names_it_ends_like_any_job(registered: Registered, named: str) -> None:
    registered.start()
    finish(registered, registered.queue.add(pair=named), half(trained=1.0))
    assert registered.sums().pairs == registered.sums().void == 0


def test_an_end_is_noted_with_its_moment_and_why(registered: Registered) -> None:
    registered.start()
    began = registered.canary
    assert time.time() - began.started_s < 60 and len(began.epoch) == 16
    registered.end("rolled_back", "worse")
    ended = registered.canary
    assert (ended.state, ended.reason, ended.epoch) == ("rolled_back", "worse", began.epoch)
    assert ended.ended_s is not None and began.started_s <= ended.ended_s < time.time() + 60
    registered.start()
    again = registered.canary
    assert (again.state, again.reason, again.ended_s) == ("running", "", None) and again.epoch != began.epoch


def test_a_candidate_is_not_promoted_over_what_an_operator_has_promoted_meanwhile(registered: Registered) -> None:
    queue, run = registered.queue, registered.queue.runner.run
    registered.start()
    assert run(registered.registry.transition(f"{queue.model}/3", ["none"], Entry(ModelState.SERVING)))
    assert run(registered.registry.promote(queue.model, "3"))
    assert registered.end("promoted", "better") == "stopped" and registered.latest == "3"
    assert registered.canary.reason == "the versions that are served have changed"


def test_a_version_cannot_be_compared_where_none_was_promoted(queue: Queue) -> None:
    registry, run = ModelRegistry(queue.async_client, queue.model), queue.runner.run
    run(registry.init(ModelStates({"m/2": Entry(ModelState.SERVING)})))
    assert run(registry.start_canary("m", "2", 0.5, Plan())) == "missing"
    assert run(registry.read()).canaries == {}


def test_a_plan_is_kept_as_it_was_asked_for(queue: Queue) -> None:
    registry, run = ModelRegistry(queue.async_client, queue.model), queue.runner.run
    states = {f"m/{version}": Entry(ModelState.SERVING) for version in "12"}
    run(registry.init(ModelStates(states, {"m": "1"})))
    plan = Plan(margin=0.25, failures=0.03)
    assert run(registry.start_canary("m", "2", 0.125, plan)) == "ok"
    [canary] = run(registry.read()).canaries.values()
    assert (canary.model, canary.base, canary.candidate, canary.share, canary.plan) == ("m", "1", "2", 0.125, plan)
    said = json.loads(str(queue.client.hget(f"{queue.prefix}ca", "m")))
    assert set(said) == {"epoch", "candidate", "share", "plan", "base", "state", "reason", "started_us"}
