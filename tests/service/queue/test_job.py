"""What travels through the queue."""

from __future__ import annotations

import json

import pytest

from service.queue.job import SCHEMA_VERSION, TERMINAL, Job, PayloadError, State
from tests.service.support import a_job


def test_a_payload_is_read_as_it_was_written() -> None:
    job = a_job(prompt='quotes " and \\ and ☃', seeds=(0, 2**32 - 1))
    assert Job.from_payload(job.to_payload()) == job
    assert json.loads(job.to_payload())["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("change", [{"schema_version": SCHEMA_VERSION - 1}, {"extra": 1}, {"prompt": None}])
def test_a_payload_of_another_version_is_refused(change: dict[str, object]) -> None:
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
