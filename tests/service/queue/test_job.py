"""What travels through the queue."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from service.queue.job import (
    PRIORITIES,
    READABLE,
    SCHEMA_VERSION,
    STEPS_DONE,
    Job,
    PayloadError,
    QueueOptions,
    Record,
    readable_lanes,
)
from service.queue.states import TERMINAL, State
from tests.service.support import a_job


def test_a_payload_is_read_as_it_was_written() -> None:
    job = a_job(prompt='quotes " and \\ and ☃', seeds=(0, 2**32 - 1))
    assert Job.from_payload(job.to_payload()) == job
    assert json.loads(job.to_payload())["schema_version"] == SCHEMA_VERSION


def test_what_another_release_says_more_or_less_does_not_matter() -> None:
    job = a_job()
    data = json.loads(job.to_payload())
    for name in ("quality", "previews", "priority", "user", "metadata", "request_id", "traceparent", "response_format"):
        del data[name]
    assert Job.from_payload(json.dumps({**data, "mood": "calm"})) == replace(job, request_id="")


def test_what_an_older_release_wrote_is_read_and_it_reads_what_asks_for_nothing_new() -> None:
    """The releases of form 3 refuse every payload that has not exactly these fields."""
    of_form_3 = {
        "schema_version", "id", "key", "model", "version", "height", "width", "steps", "prompt", "seeds",
        "output_format", "quality", "response_format", "previews", "priority", "user", "metadata", "request_id",
        "traceparent",
    }  # fmt: skip
    job = a_job()
    assert set(json.loads(job.to_payload())) == of_form_3 and job.lane == "3|fake|1"


def test_a_job_that_asks_for_something_new_keeps_away_from_those_who_would_not_do_it() -> None:
    job = a_job(candidates=4, seeds=(1, 2))
    assert json.loads(job.to_payload())["schema_version"] == 4 and job.lane == "4|fake|1"
    assert Job.from_payload(job.to_payload()) == job
    assert (job.images, job.cost) == (8, 4 * a_job(seeds=(1, 2)).cost)
    video = a_job(frames=9, fps=8)
    assert Job.from_payload(video.to_payload()) == video and video.lane == "5|fake|1"
    assert readable_lanes(a_job().lane) == (a_job().lane, job.lane, video.lane)


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"schema_version": max(READABLE) + 1}, {"prompt": None}])
def test_a_payload_that_cannot_be_understood_is_refused(change: dict[str, object]) -> None:
    data = {**json.loads(a_job().to_payload()), **change}
    if data["prompt"] is None:
        del data["prompt"]
    with pytest.raises(PayloadError):
        Job.from_payload(json.dumps(data))


@pytest.mark.parametrize("payload", ["", "nothing", "[]", "3", "{}"])
def test_a_payload_that_is_none_is_refused(payload: str) -> None:
    with pytest.raises(PayloadError):
        Job.from_payload(payload)


def test_the_batch_key_is_made_of_what_batch_mates_must_share_and_of_nothing_else() -> None:
    def key(job: Job) -> tuple[str, str]:
        return job.lane, job.shape

    same = [
        a_job(prompt="x"),
        a_job(seeds=(1, 2)),
        a_job(output_format="webp"),
        a_job(quality=5),
        a_job(key="k"),
        a_job(request_id="y"),
    ]
    other = [a_job(model="m"), a_job(version="2"), a_job(height=32), a_job(width=32), a_job(steps=2)]
    assert {key(job) for job in same} == {key(a_job())}
    assert len({key(job) for job in [a_job(), *other]}) == 6


def test_a_state_is_terminal_unless_something_can_follow() -> None:
    assert set(State) - TERMINAL == {State.QUEUED, State.RUNNING}


def test_what_is_not_said_is_nothing() -> None:
    """Nobody's prompt trains a student, no candidate is drawn and nobody goes first unless it was asked for."""
    asked = Job("i", "k", "m", "1", 64, 32, 4, "p", (7,), "png")
    required = {"id", "key", "model", "version", "height", "width", "steps", "prompt", "seeds", "output_format"}
    said = {name: value for name, value in asdict(asked).items() if name not in required}
    assert said == {
        "quality": None, "response_format": "b64_json", "previews": 0, "priority": 0, "user": None, "metadata": {},
        "request_id": "", "traceparent": "", "candidates": 1, "candidate_seeds": (), "rank_by": "",
        "min_reward": None, "cascade": (), "frames": 0, "fps": 0, "pair": "", "may_train": False,
    }  # fmt: skip
    data = {**{name: getattr(asked, name) for name in required}, "schema_version": 3}
    assert Job.from_payload(json.dumps(data)) == asked
    assert asdict(QueueOptions(1.0)) == {
        "timeout_s": 1.0, "client": "", "watched": False, "idempotency": "", "body": "", "webhook": "", "quota": None,
        "solo": False, "key_pending": 0, "open_ended": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, 3),
        ({"candidates": 2}, 4),
        ({"candidate_seeds": ((1, 2),)}, 4),
        ({"rank_by": "trained"}, 4),
        ({"min_reward": 0.0}, 4),
        ({"cascade": (1, 2)}, 4),
        ({"frames": 5}, 5),
        ({"fps": 8}, 5),
        ({"candidates": 2, "frames": 5}, 5),
        ({"pair": "m|e|p|base"}, 3),
        ({"may_train": True}, 3),
    ],
)
def test_each_field_that_came_later_has_its_form(changes: dict[str, Any], form: int) -> None:
    job = a_job(**changes)
    assert (job.form, job.lane) == (form, f"{form}|fake|1") and Job.from_payload(job.to_payload()) == job


def test_a_job_costs_its_pixel_steps_and_at_least_something() -> None:
    assert a_job().cost == 64 * 64 * 4 // 1000 and a_job(height=8, width=8, steps=1).cost == 1
    assert a_job(seeds=(1, 2, 3)).cost == 3 * 16 and a_job(frames=5).cost == 64 * 64 * 5 * 4 // 1000
    assert a_job(candidates=4, min_reward=0.5).cost == 16, "of the first round"
    assert (a_job(frames=9).shape, a_job(width=32).shape) == ("64x64x9|4", "64x32|4")


def test_names_that_releases_share() -> None:
    """A worker of one release and an HTTP process of another: what one writes the other one finds."""
    assert STEPS_DONE == "steps" and tuple(PRIORITIES) == tuple(range(-5, 6))


@pytest.mark.parametrize(
    ("state", "scoring", "terminal", "settled"),
    [
        (State.QUEUED, "", False, False),
        (State.RUNNING, "", False, False),
        (State.DONE, "", True, True),
        (State.DONE, "pending", True, False),
        (State.DONE, "lost", True, True),
        (State.FAILED, "", True, True),
    ],
)
def test_a_job_is_settled_when_nothing_of_it_is_to_come(
    state: State, scoring: str, terminal: bool, settled: bool
) -> None:
    record = Record("i", state, {}, scoring=scoring, payload=a_job().to_payload())
    assert (record.terminal, record.settled, record.readable) == (terminal, settled, True)
    assert not Record("i", state, {}, payload="{}").readable
