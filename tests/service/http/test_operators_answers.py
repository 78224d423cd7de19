"""What the operator's addresses and those about the service itself answer, field by field, for a queue that is known.

An HTTP process in this process, on a real server; nobody draws.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import redis
from starlette.responses import Response

from service.errors import ServiceError
from service.http.access import SCOPE_OF
from service.http.app import build_app
from service.http.models import VideoLengths, _lengths, _probe, listed, retrieve
from service.http.routes import canaries, dlq, models
from service.http.routes.canaries import _report
from service.models.choice import Choice, Served
from service.models.controller import Version
from service.models.folder import Name
from service.quality.canary import Canary, Plan, Sum, Sums
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.queue.job import Verdict
from service.queue.scripts import prefix
from service.queue.status import Worker
from service.settings import Settings
from service.supervise.redis_server import EmbeddedServer
from student.runtimes.fake import fake_student, fake_video_student
from tests.service.support import a_job

PREFIX = prefix("fake")
HOLDS = {"fake/1": {"runtime": "onnx-fused-fp32", "shows_steps": True, "probe": {"outcome": "same", "at_s": 50}}}
READY = {
    "runtime": "onnx", "host": "b", "max_batch": 8, "shows_steps": True, "models": HOLDS, "load_s": 3.0,
    "warm_up_s": 1.5, "state": "ready", "jobs": 2,
}  # fmt: skip
IDLE = {"runtime": "", "host": "a", "max_batch": 4, "models": {}, "state": "loading", "jobs": 0}


class Process:
    """An HTTP process of the fake student, asked one thing at a time."""

    def __init__(self, url: str, folder: Path) -> None:
        self.redis: redis.Redis = connect(url)
        self.settings = Settings(runtime="fake", redis_url=url, data_dir=folder, result_ttl_s=600.0)

    def ask(self, *calls: tuple[str, str], client: str = "127.0.0.1", **settings: Any) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            app = build_app(self.settings.model_copy(update=settings))
            transport = httpx.ASGITransport(app, client=(client, 1))
            async with app.router.lifespan_context(app):
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
                    return [await asking.request(method, path) for method, path in calls]

        return asyncio.run(run())

    def get(self, *paths: str, **settings: Any) -> list[Any]:
        answers = self.ask(*(("GET", path) for path in paths), **settings)
        assert {answer.status_code for answer in answers} == {200}, answers
        return [answer.json() for answer in answers]

    def beat(self, name: str, said: dict[str, Any]) -> Consumer:
        worker = Consumer(self.redis, "fake", name, lease_s=60, max_attempts=1)
        worker.beat(said, [])
        return worker

    def put(self, state: str, **fields: Any) -> str:
        """A record as the scripts write it."""
        job = a_job(prompt="a canary", seeds=(1, 2), key="ann")
        at_us = int(time.time() * 1e6)
        row = {"state": state, "key": "ann", "payload": job.to_payload(), "created_us": at_us, **fields}
        self.redis.hset(f"{PREFIX}j:{job.id}", mapping=row)
        return job.id


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def process(server: EmbeddedServer, tmp_path: Path) -> Iterator[Process]:
    found = Process(server.url, tmp_path)
    yield found
    found.redis.flushall()
    found.redis.close()


def test_workers_are_listed_by_host_with_what_they_hold(process: Process) -> None:
    process.beat("w", READY), process.beat("v", IDLE)
    [listed] = process.get("/admin/workers")
    assert listed["data"] == [
        {"id": "v", "host": "a", "state": "loading", "models": [], "runtime": "", "jobs": 0},
        {"id": "w", "host": "b", "state": "ready", "models": ["fake/1"], "runtime": "onnx", "jobs": 2},
    ]


def test_a_worker_is_paused_resumed_and_drained_and_each_is_answered_as_it_is_now(process: Process) -> None:
    process.beat("w", READY)
    verbs = ("pause", "resume", "drain", "resume", "pause")
    answers = process.ask(*(("POST", f"/admin/workers/w/{verb}") for verb in verbs), ("POST", "/admin/workers/x/pause"))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 409, 409, 404]
    assert [answer.json()["state"] for answer in answers[:3]] == ["paused", "ready", "draining"]
    draining, _, unknown = (answer.json()["error"] for answer in answers[3:])
    assert (draining["code"], unknown["code"]) == ("conflict", "not_found")
    assert draining["message"] == "The worker is draining: it ends when it has generated what it holds."


def test_the_service_is_described_with_its_workers_and_is_ready_when_one_claims(process: Process) -> None:
    process.beat("w", READY)
    info, ready = process.get("/info", "/readyz")
    assert (info["model"], info["model_version"], info["config"]["result_ttl_s"]) == ("fake", "1", 600.0)
    wanted = ("host", "runtime", "models", "max_batch", "shows_steps", "state", "load_s", "warm_up_s")
    assert info["workers"] == [{name: READY[name] for name in wanted}]
    assert ready == {
        "status": "ready", "model": "fake", "model_version": "1", "runtime": "onnx-fused-fp32", "workers": 1,
        "load_s": 3.0, "warm_up_s": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "No worker is alive."),
        (IDLE, "No worker has loaded fake/1 yet."),
        ({**READY, "state": "paused"}, "Every worker that has loaded fake/1 is paused or draining."),
        ({**READY, "state": "draining"}, "Every worker that has loaded fake/1 is paused or draining."),
    ],
)
def test_it_is_not_ready_and_says_why(said: dict[str, Any] | None, reason: str, process: Process) -> None:
    if said:
        process.beat("w", said)
    [answer] = process.ask(("GET", "/readyz"))
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, reason)
    assert answer.headers["Retry-After"] == "1"


def test_a_worker_with_another_model_does_not_make_up_for_one_that_is_paused(process: Process) -> None:
    process.beat("w", {**READY, "state": "paused"})
    process.beat("v", {**READY, "models": {"other/1": READY["models"]["fake/1"]}})
    [answer] = process.ask(("GET", "/readyz"))
    assert answer.status_code == 503 and "fake/1 is paused or draining" in answer.json()["error"]["message"]


def test_one_worker_that_claims_is_enough(process: Process) -> None:
    process.beat("w", READY), process.beat("v", {**READY, "state": "paused"})
    [answer] = process.ask(("GET", "/readyz"))
    assert (answer.status_code, answer.json()["workers"]) == (200, 2)


def test_a_model_says_what_can_be_asked_of_it_and_who_holds_it(process: Process) -> None:
    process.beat("w", READY), process.beat("v", IDLE)
    probes = {"fake/1": {"runtime": "torch", "shows_steps": False, "probe": {"outcome": "failed", "at_s": 40}}}
    process.beat("u", {**READY, "models": probes})
    every, one, named = process.get("/v1/models", "/v1/models/fake", "/v1/models/fake@1")
    [model] = every["data"]
    [version] = model.pop("versions")
    assert model == {"id": "fake", "object": "model", "created": 0, "owned_by": "fewstep", "latest": "1"}
    assert one["versions"] == named["versions"] == [version]
    assert {name: value for name, value in version.items() if name not in ("best_of", "runtime")} == {
        "version": "1", "latest": True, "steps": [1, 2, 4], "width": 64, "height": 64, "num_frames": None, "fps": None,
        "lengths": None, "max_prompt_tokens": version["max_prompt_tokens"], "scorers": ["heldout", "trained"],
        "shows_steps": True, "workers": 2, "probe": {"outcomes": {"same": 1, "failed": 1}, "oldest_s": 40},
    }  # fmt: skip
    assert version["runtime"] in ("torch", "onnx-fused-fp32")
    [unknown] = process.ask(("GET", "/v1/models/fake@2"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_what_workers_say_of_probes_and_lengths_is_put_together() -> None:
    holding: list[dict[str, Any]] = [{"probe": {"outcome": "same", "at_s": 9}}, {"probe": {"outcome": "same"}}, {}]
    report = _probe(holding)
    assert (report.outcomes, report.oldest_s) == ({"same": 2, "none": 1}, 9) and _probe([]).oldest_s is None
    student = fake_video_student()
    name, size = Name(student.id, student.version), f"{student.image.width}x{student.image.height}"

    def worker(lengths: Any) -> Worker:
        return Worker("w", "r", "h", 8, False, {str(name): {"lengths": {size: lengths}}})

    assert _lengths(name, student, []) is None
    free = [worker([1, most, 4]) for most in (9, 17)]
    assert _lengths(name, student, free) == VideoLengths(shortest=1, longest=17, step=4, compiled=None)
    compiled = [worker({"compiled": counts}) for counts in ([5, 9], [9, 17])]
    assert _lengths(name, student, compiled) == VideoLengths(shortest=5, longest=17, step=4, compiled=[5, 9, 17])


def test_dead_letters_are_listed_newest_first_and_their_prompts_only_where_it_is_said(process: Process) -> None:
    created_us, died_us = 1_500_000_000_000_000, 1_600_000_000_000_000
    old, new = (process.put("failed", created_us=created_us, attempts=3, worker="w") for _ in range(2))
    process.redis.zadd(f"{PREFIX}dead", {old: died_us - 1e6, new: died_us})
    row = {
        "id": new, "model": "fake", "model_version": "1", "key": "ann", "attempts": 3, "worker": "w",
        "created": 1_500_000_000, "died": 1_600_000_000, "steps": 4, "images": 2, "prompt": None, "prompt_chars": 8,
    }  # fmt: skip
    [whole, short] = process.get("/admin/dlq", "/admin/dlq?limit=1")
    listed = whole["data"]
    assert len(listed[0].pop("prompt_sha256")) > 4 and listed[0] == row and listed[1]["id"] == old
    assert [one["id"] for one in short["data"]] == [new]
    [shown] = process.get("/admin/dlq", log_prompts=True)
    assert shown["data"][0]["prompt"] == "a canary"


def test_a_dead_letter_is_retried_within_the_time_of_jobs_that_are_fetched_later(process: Process) -> None:
    id = process.put("failed", attempts=3, worker="w")
    process.redis.zadd(f"{PREFIX}dead", {id: time.time() * 1e6})
    [answer] = process.ask(("POST", f"/admin/dlq/{id}/retry"), job_timeout_s=1234.0, quota=0.000001)
    assert answer.status_code == 200 and answer.json()["id"] == id
    other = process.redis.hgetall(f"{PREFIX}j:{answer.json()['retried_as']}")
    assert (int(other["deadline_us"]) - int(other["created_us"])) / 1e6 == 1234.0  # type: ignore[index]
    assert str(other["bucket"]).endswith("|solo") and "charged" not in other  # type: ignore[index,operator]
    refused = process.ask(("POST", f"/admin/dlq/{id}/retry"), ("POST", f"/admin/dlq/{id}/drop"))
    assert [one.status_code for one in refused] == [404, 404]


def test_usage_is_by_day_and_key_in_megapixel_steps(process: Process) -> None:
    today = int(time.time() // 86_400)
    for day, work in ((today, 1500), (today - 29, 500), (today - 30, 7)):
        row = {"ann|jobs": 2, "ann|images": 3, "ann|work": work}
        process.redis.hset(f"{PREFIX}u:{day}", mapping=row)
    month, more = process.get("/admin/usage", "/admin/usage?days=31")
    rows = month["data"]
    assert [(row["megapixel_steps"], row["jobs"], row["images"], row["key"]) for row in rows] == [
        (1.5, 2, 3, "ann"), (0.5, 2, 3, "ann"),
    ]  # fmt: skip
    assert rows[0]["day"] == time.strftime("%Y-%m-%d", time.gmtime(today * 86_400))
    assert len(more["data"]) == 3


def test_drifts_are_told_with_their_evidence_and_whose_fault_it_is(process: Process) -> None:
    process.beat("w", {**READY, "models": {"fake/1": {**HOLDS["fake/1"], "probe": {"outcome": "pixels_changed"}}}})
    at_us = str(int(time.time() * 1e6))
    quiet = {"n": 7, "mean": 0.5, "low": 0.25, "at_us": at_us}
    process.redis.hset(f"{PREFIX}dr", "fake/1|4|64x64|heldout|selected", json.dumps(quiet))
    alarm = {**quiet, "e": [30.0, 0.0, 0.0, 0.0], "limit": 5.0}
    process.redis.hset(f"{PREFIX}dr", "fake/1|4|64x64|trained|raw", json.dumps(alarm))
    [report] = process.get("/admin/drift")
    selected, raw = report["data"]
    assert (selected["selected"], selected["evidence"], selected["cause"]) == (True, 0.0, None)
    assert raw["evidence"] >= 1 and raw.pop("direction") and raw["cause"] == "engine"
    assert {name: raw[name] for name in raw.keys() - {"evidence", "cause"}} == {
        "model": "fake", "version": "1", "steps": 4, "size": "64x64", "scorer": "trained", "selected": False, "jobs": 7,
        "mean": 0.5, "low_share": 0.25,
    }  # fmt: skip


def test_a_canary_is_reported_with_the_width_that_its_figures_share() -> None:
    sums = Sums(100, 1, 2, 3, 4, {"reward:t": Sum(100, 10.0, 6.0), "reward:h": Sum(3, 1.0, 1.0)})
    canary = Canary("m", "1", "2", "e", 0.25, Plan(alpha=0.08), "running", "", 5.5, None)
    report = _report(canary, sums).model_dump()
    trained = report["rewards"].pop("t")
    assert trained["half_width"] == pytest.approx(sums.rewards["t"].half_width(0.02)), "two scorers, failures, time"
    assert (trained["mean"], trained["pairs"]) == (pytest.approx(0.1), 100)
    assert report == {
        "model": "m", "base": "1", "candidate": "2", "state": "running", "reason": "", "share": 0.25, "started": 5.5,
        "ended": None, "pairs": 100, "base_failed": 1, "candidate_failed": 2,
        "rewards": {"h": {"mean": pytest.approx(1 / 3), "half_width": None, "pairs": 3}},
        "slowdown": {"mean": 0.0, "half_width": None, "pairs": 0},
    }  # fmt: skip
    ended = _report(replace(canary, state="stopped", reason="r", ended_s=9.0), sums)
    assert (ended.state, ended.reason, ended.ended) == ("stopped", "r", 9.0)


def test_a_service_of_one_student_has_no_models_to_operate(process: Process) -> None:
    calls = [("GET", "/admin/models"), ("GET", "/admin/canaries"), ("POST", "/admin/models/fake/1/load"),
             ("POST", "/admin/canaries/fake/1/stop")]  # fmt: skip
    for answer in process.ask(*calls):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert "FEWSTEP_MODELS serves several" in answer.json()["error"]["message"]


def test_a_scrape_counts_who_holds_what_and_goes_on_without_the_queue(process: Process) -> None:
    process.beat("w", READY), process.beat("v", IDLE)
    process.redis.hset(f"{PREFIX}n", "finished", 4)
    [answer] = process.ask(("GET", "/metrics"))
    assert answer.headers["Content-Type"].startswith("text/plain")
    lines = set(answer.text.splitlines())
    assert {
        'fewstep_model_workers{model="fake",version="1"} 1.0', "fewstep_ready_workers 1.0", "fewstep_workers 2.0",
        'fewstep_worker_states{state="loading"} 1.0', "fewstep_queue_up 1.0", "fewstep_jobs_finished_total 4.0",
        'fewstep_probe_workers{model="fake",outcome="same",version="1"} 1.0', "fewstep_redis_append_ok 1.0",
    } <= lines  # fmt: skip
    [away] = process.ask(("GET", "/metrics"), redis_url="unix:///nowhere.sock")
    assert away.status_code == 200 and "fewstep_queue_up 0.0" in away.text.splitlines()


def test_a_canary_is_started_with_the_margins_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []

    async def controller_of(services: Any) -> str:
        return "the controller"

    async def start_canary(controller: Any, name: Name, share: float, plan: Plan, wait_s: float) -> Canary:
        started.append((controller, name, share, plan, wait_s))
        return Canary(name.id, "1", name.version, "e", share, plan)

    monkeypatch.setattr(canaries, "controller_of", controller_of)
    monkeypatch.setattr(canaries, "start_canary", start_canary)
    asked: dict[str, Any] = {"share": 0.5, "margin": 2.0, "failures": 0.25, "slowdown": 3.0, "wait_s": 7.0}
    report = asyncio.run(canaries.start("m", "2", None, None, **asked))  # type: ignore[arg-type]
    plan = Plan(margin=2.0, failures=0.25, slowdown=3.0)
    assert started == [("the controller", Name("m", "2"), 0.5, plan, 7.0)]
    assert (report.model, report.candidate, report.share, report.pairs) == ("m", "2", 0.5, 0)


def test_without_keys_others_may_draw_and_read_but_see_nothing_of_each_other_and_of_the_operator(
    process: Process,
) -> None:
    process.beat("w", READY)
    names = {"id": "0" * 32, "k": 0, "model": "fake", "version": "1", "action": "remix"}
    calls = {(method, path): (method, path.format(**names)) for method, path in SCOPE_OF}
    theirs = dict(zip(calls, process.ask(*calls.values(), client="192.0.2.1", insecure=True), strict=True))
    refused = {call for call, answer in theirs.items() if answer.status_code == 403}
    listing = {("GET", "/jobs"), ("GET", "/v1/videos")}
    assert refused == {call for call, scope in SCOPE_OF.items() if scope == "admin"} | listing
    assert {theirs[call].json()["error"]["code"] for call in refused} == {"insufficient_scope"}
    assert theirs["GET", "/info"].json()["config"] is None and theirs["GET", "/metrics"].status_code == 200
    ours = process.ask(("GET", "/jobs"), ("GET", "/v1/videos"), ("GET", "/info"), ("GET", "/jobs?all=true"))
    assert [answer.status_code for answer in ours] == [200, 200, 200, 403], "there are no keys whose jobs are all"
    assert ours[2].json()["config"] is not None


def test_of_several_workers_the_one_that_is_named_is_told_and_answered(process: Process) -> None:
    for name in ("u", "v", "w", "x"):
        process.beat(name, {**READY, "host": f"host of {name}"})
    [paused, drained] = process.ask(("POST", "/admin/workers/v/pause"), ("POST", "/admin/workers/x/drain"))
    said = [(answer.json()["id"], answer.json()["host"], answer.json()["state"]) for answer in (paused, drained)]
    assert said == [("v", "host of v", "paused"), ("x", "host of x", "draining")]
    [listed] = process.get("/admin/workers")
    assert {row["id"]: row["state"] for row in listed["data"]} == {
        "u": "ready", "v": "paused", "w": "ready", "x": "draining",
    }  # fmt: skip


def test_a_scrape_has_what_is_measured_on_gpus_and_of_quality_and_what_it_is_measured_against(process: Process) -> None:
    gpu = {"busy": 0.5, "used_bytes": 7.0, "total_bytes": 9.0, "power_w": 11.0, "temperature_c": 13.0}
    other = {"other/2": {"runtime": "torch", "shows_steps": False}}
    process.beat("w", {**READY, "gpus": {"GPU-1": gpu}})
    process.beat(
        "v", {**READY, "host": "c", "models": {**HOLDS, **other}, "gpus": {"GPU-2": {**gpu, "used_bytes": 8.0}}}
    )
    at_us = str(int(time.time() * 1e6))
    state = {"n": 7, "mean": 0.5, "low": 0.25, "at_us": at_us, "e": [30.0, 0.0, 0.0, 0.0], "limit": 5.0}
    process.redis.hset(f"{PREFIX}dr", "fake/1|4|64x64|trained|raw", json.dumps(state))
    [answer] = process.ask(("GET", "/metrics"))
    lines = set(answer.text.splitlines())
    known = fake_student().reward_reference["trained"]
    of = 'model="fake",scorer="trained",selected="false",size="64x64",steps="4",version="1"'
    assert {
        'fewstep_gpu_memory_used_bytes{gpu="GPU-1",host="b"} 7.0',
        'fewstep_gpu_memory_used_bytes{gpu="GPU-2",host="c"} 8.0',
        'fewstep_model_workers{model="fake",version="1"} 2.0', 'fewstep_model_workers{model="other",version="2"} 1.0',
        "fewstep_ready_workers 2.0", f"fewstep_drift_jobs{{{of}}} 7.0",
        f'fewstep_reward_reference_mean{{model="fake",scorer="trained",version="1"}} {known.mean}',
        f'fewstep_reward_reference_std{{model="fake",scorer="trained",version="1"}} {known.std}',
    } - lines == set()  # fmt: skip


def test_a_model_that_still_moves_is_accepted_and_one_that_has_arrived_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []
    holds = Worker("w", "r", "h", 8, False)

    async def controller_of(services: Any) -> str:
        return "the controller"

    def moved(verb: str, state: str) -> Any:
        async def move(*arguments: Any) -> Version:
            asked.append((verb, *arguments))
            return Version(arguments[1], state, "", False, (holds, holds))

        return move

    monkeypatch.setattr(models, "controller_of", controller_of)
    name = Name("cats", "2")
    for verb, states in (
        ("load", {"loading": 202, "serving": 200}), ("unload", {"unloading": 202, "unloaded": 200, "refused": 200}),
    ):  # fmt: skip
        for state, status in states.items():
            monkeypatch.setattr(models, verb, moved(verb, state))
            route, response = getattr(models, f"{verb}_version"), Response()
            found = asyncio.run(route("cats", "2", None, None, response, 7.0))
            assert (found.state, found.workers, response.status_code) == (state, 2, status)
            assert asked.pop() == (verb, "the controller", name, 7.0)


def test_each_version_of_each_model_says_who_holds_it() -> None:
    student = fake_student()
    served = {
        Name(id, version): Served(replace(student, id=id, version=version), len)
        for id, version in (("cats", "1"), ("cats", "2"), ("dogs", "1"))
    }

    def holding(**names: tuple[str, bool]) -> Worker:
        about = {
            name.replace("_", "/"): {"runtime": runtime, "shows_steps": shows}
            for name, (runtime, shows) in names.items()
        }
        return Worker("w", "r", "h", 8, True, about)

    workers = [
        holding(cats_1=("onnx", False), cats_2=("onnx", False)),
        holding(cats_2=("torch", True)),
        holding(dogs_9=("x", True)),
    ]

    async def all_workers() -> list[Worker]:
        return workers

    services: Any = SimpleNamespace(
        models=SimpleNamespace(choice=Choice(served, {"cats": "1"})), producer=SimpleNamespace(workers=all_workers)
    )
    cats, dogs = asyncio.run(listed(services))
    assert (cats.id, cats.latest, dogs.id, dogs.latest) == ("cats", "1", "dogs", "1")
    rows = [(row.version, row.latest, row.workers, row.runtime, row.shows_steps) for row in cats.versions]
    assert rows == [("1", True, 1, "onnx", False), ("2", False, 2, "onnx", True)]
    [nobodys] = dogs.versions
    assert (nobodys.workers, nobodys.runtime, nobodys.shows_steps) == (0, None, False)
    assert asyncio.run(retrieve(services, "cats")) == cats
    assert [row.version for row in asyncio.run(retrieve(services, "cats@2")).versions] == ["2"]
    assert [row.version for row in asyncio.run(retrieve(services, "cats@latest")).versions] == ["1"]


@pytest.mark.parametrize(
    ("word", "status"),
    [("ok", 200), ("known", 200), ("attached", 200), ("full", 503), ("key_full", 503), ("late", 503), ("gone", 404)],
)
def test_a_retry_is_answered_as_the_queue_has_it(word: Any, status: int) -> None:
    verdict = Verdict(word, "i", 6.5, 0)
    if status == 200:
        return dlq._check(verdict)
    with pytest.raises(ServiceError) as refused:
        dlq._check(verdict)
    assert refused.value.status == status and refused.value.headers.get("Retry-After") == (
        "7" if status == 503 else None
    )
