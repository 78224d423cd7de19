"""The queue's states on models, on a real server: what may follow what; a job and a closing are never at odds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from service.models.choice import Choice, Served
from service.models.folder import Name, age
from service.models.registry import Entry, ModelRegistry, ModelState, ModelStates, WorkerRegistry
from service.quality.canary import Canary, Decision, Plan
from service.queue.job import Job, QueueOptions, lane
from service.queue.producer import Producer
from student.runtimes.fake import fake_student
from tests.service.support import Queue, a_job

SERVING, LOADING = Entry(ModelState.SERVING), Entry(ModelState.LOADING, "try")


class Models:
    """Both sides of the states of one queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.registry = ModelRegistry(queue.async_client, queue.model)
        self.worker = WorkerRegistry(queue.client, queue.model)
        self.producer = Producer(queue.async_client, queue.model, "api", managed=True, **queue.limits)

    def run(self, call: Any) -> Any:
        return self.queue.runner.run(call)

    def serve(self, *names: str) -> None:
        for name in names:
            assert self.run(self.registry.transition(name, ["none", "unloaded"], SERVING))
            self.run(self.registry.promote_first(*name.split("/")))

    def enqueue(self, job: Job) -> str:
        return str(self.run(self.producer.enqueue(job, QueueOptions(timeout_s=60.0))).word)


def job(version: str = "1") -> Job:
    return a_job(model="a", version=version)


def test_a_move_names_the_state_that_it_starts_from(queue: Queue) -> None:
    models = Models(queue)
    assert models.run(models.registry.transition("a/1", ["none"], LOADING)) is True
    assert models.run(models.registry.transition("a/1", ["none", "serving"], SERVING)) is False
    assert models.worker.read() == ModelStates({"a/1": LOADING}, {})
    assert models.run(models.registry.promote("a", "1")) is False, "it is not served yet"
    assert models.run(models.registry.transition("a/1", ["loading"], SERVING)) is True
    models.run(models.registry.init(ModelStates({"a/1": LOADING, "b/1": LOADING}, {"a": "1"})))
    assert models.run(models.registry.read()) == ModelStates({"a/1": SERVING, "b/1": LOADING}, {"a": "1"}), (
        "what was said stays said"
    )


def test_neither_the_last_nor_the_promoted_one_can_be_unloaded(queue: Queue) -> None:
    models = Models(queue)
    models.serve("a/1")
    assert models.run(models.registry.unload("a/1")) == "last"
    models.serve("a/2")
    assert models.run(models.registry.unload("a/1")) == "promoted"
    assert models.run(models.registry.promote("a", "2")) and models.run(models.registry.unload("a/1")) == "ok"
    assert models.run(models.registry.unload("a/1")) == "missing"
    models.serve("b/1")
    assert models.run(models.registry.unload("a/2")) == "ok", "the only version of its model"
    assert models.run(models.registry.read()).promoted == {"b": "1"}


def test_a_version_that_is_not_served_is_no_other_one_to_fall_back_on(queue: Queue) -> None:
    models = Models(queue)
    models.serve("a/1")
    models.run(models.registry.init(ModelStates({"a/2": LOADING, "ab/1": LOADING})))
    assert models.run(models.registry.unload("a/1")) == "last"
    models.run(models.registry.promote_first("ab", "1"))
    assert models.run(models.registry.read()).promoted == {"a": "1"}, "it still loads"
    assert models.run(models.registry.transition("ab/1", ["loading"], SERVING))
    assert models.run(models.registry.unload("a/1")) == "ok"
    found = models.run(models.registry.read())
    assert found.entries["a/1"] == Entry(ModelState.UNLOADING) and found.promoted == {}


def test_a_refusal_keeps_its_reason_and_its_attempt(queue: Queue) -> None:
    models = Models(queue)
    models.run(models.registry.init(ModelStates({"a/1": LOADING})))
    refused = Entry(ModelState.REFUSED, "try", "no room")
    assert models.run(models.registry.transition("a/1", ["none", "loading"], refused))
    assert models.worker.read() == ModelStates({"a/1": refused})
    keys = [f"{queue.prefix}m", f"{queue.prefix}ma"]
    models.serve("b/1")
    assert [queue.client.ttl(key) for key in keys] == [-1, -1], "what an operator decided does not expire"


def test_no_job_is_taken_for_a_model_from_the_moment_when_it_is_unloaded(queue: Queue) -> None:
    models = Models(queue)
    models.serve("a/1", "a/2")
    first, second = job("2"), job("2")
    assert models.enqueue(first) == "ok"
    assert models.run(models.registry.unload("a/2")) == "ok"
    assert models.enqueue(second) == "gone" and models.enqueue(job("3")) == "gone" and models.enqueue(job()) == "ok"
    assert models.enqueue(first) == "known", "what was accepted stays accepted"
    mine = lane("a", "2")
    assert not models.worker.idle(mine), "it waits"
    worker = queue.consumer("w")
    [claimed] = worker.claim({mine: 8})
    assert not models.worker.idle(mine), "it runs"
    worker.finish(claimed.id, claimed.token, "done", {})
    assert models.worker.idle(mine) and not models.worker.idle(lane("a", "1"))


def test_a_server_without_its_data_takes_jobs_until_it_is_told_again(queue: Queue) -> None:
    assert Models(queue).enqueue(job()) == "ok"


def test_a_worker_claims_from_all_its_lanes_and_each_has_its_own_batch_size(queue: Queue) -> None:
    models = Models(queue)
    models.serve("a/1", "a/2", "b/1")
    for version in ("2", "1", "2", "2", "1"):
        assert models.enqueue(job(version)) == "ok"
    assert models.enqueue(a_job(model="b", version="1")) == "ok"
    worker, sizes = queue.consumer("w"), {lane("a", "1"): 8, lane("a", "2"): 2}
    batches = []
    while batch := worker.claim(sizes):
        jobs = [Job.from_payload(claimed.payload) for claimed in batch]
        batches.append([found.version for found in jobs])
        for claimed in batch:
            worker.finish(claimed.id, claimed.token, "done", {})
    assert sorted(batches) == [["1", "1"], ["2"], ["2", "2"]], (
        "never two students in a batch, never a lane not asked for"
    )


def test_latest_is_the_promoted_version_and_else_the_newest_as_people_count() -> None:
    names = [Name("a", version) for version in ("10", "9", "2-rc1")]
    served = {name: Served(fake_student(), lambda prompt: 1) for name in names}
    assert Choice(served).latest("a") == "10" and Choice(served, {"a": "9"}).latest("a") == "9"
    assert Choice(served, {"a": "3"}).latest("a") == "10" and Choice(served).latest("b") is None
    assert sorted(["1.10", "1.9", "1.9-b", "2", "1"], key=age) == ["1", "1.9", "1.9-b", "1.10", "2"]


def test_a_version_is_compared_only_while_its_canary_runs_and_the_candidate_is_served() -> None:
    served = {Name("a", version): Served(fake_student(), lambda prompt: 1) for version in ("1", "2")}
    running = Canary("a", "1", "2", "e", 0.05, Plan())
    assert Choice(served, canaries={"a": running}).canary(Name("a", "1")) == (running, served[Name("a", "2")])
    assert Choice(served, canaries={"a": running}).canary(Name("a", "2")) is None, "it is the candidate"
    for over in (replace(running, state=Decision.PROMOTE), replace(running, candidate="3")):
        assert Choice(served, canaries={"a": over}).canary(Name("a", "1")) is None
    assert Choice(served).canary(Name("a", "1")) is None


def test_a_version_is_idle_whatever_others_draw_and_not_while_a_job_of_any_form_is_its_own(queue: Queue) -> None:
    models = Models(queue)
    models.serve("a/1", "a/2")
    other, mine, worker = lane("a", "1"), lane("a", "2"), queue.consumer("w")
    assert models.enqueue(job("1")) == "ok" and len(worker.claim({other: 1})) == 1
    assert models.worker.idle(mine) and not models.worker.idle(other), "the other one runs"
    for changes in ({"candidates": 2}, {"frames": 5, "fps": 8}):
        asked = replace(job("2"), **changes)  # type: ignore[arg-type]
        assert models.enqueue(asked) == "ok" and asked.lane != mine
        assert not models.worker.idle(mine), "it waits"
        [claimed] = worker.claim({mine: 1})
        assert not models.worker.idle(mine), "it runs"
        worker.finish(asked.id, claimed.token, "done", {})
        assert models.worker.idle(mine)
