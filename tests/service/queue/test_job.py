"""What travels through the queue."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from service.queue.job import READABLE, SCHEMA_VERSION, Job, PayloadError, readable_lanes
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
