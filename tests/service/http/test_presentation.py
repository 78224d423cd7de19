"""What an answer says of a job, field by field, for records that are known."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import ServiceError, StoreUnavailable
from service.http import presentation
from service.http.links import Link
from service.http.presentation import (
    drawn_images,
    failure,
    generated,
    image_file,
    job_status,
    main_score,
    progress_of,
    scoring_of,
    timings,
)
from service.models.choice import Name
from service.queue.job import Position, Record
from service.queue.result import read_result, write_result
from service.queue.states import State
from service.results.store import ResultMissing
from student.runtimes.fake import fake_student
from tests.service.support import a_job

DATA = b"the bytes of an image"
SHA256 = hashlib.sha256(DATA).hexdigest()
JOB = a_job(
    id="a" * 32, seeds=(7, 9), key="ann", user="u", metadata={"m": "n"}, priority=-2, output_format="webp",
    response_format="url",
)  # fmt: skip
IMAGE = {
    "file": "ref", "seed": 7, "width": 64, "height": 32, "sha256": SHA256, "reward": {"trained": 0.25, "heldout": 9.0},
}  # fmt: skip
RESULT = {
    "runtime": "fake", "batch_size": 3, "images": [IMAGE, {**IMAGE, "seed": 9}],
    "timings": {"queue_s": 1.0, "inference_s": 2.0, "score_s": 0.25, "encode_s": 0.5, "of_a_later_release": 1.0},
}  # fmt: skip


class Results:
    """A store of one image."""

    def __init__(self, data: bytes | Exception = DATA) -> None:
        self.data = data

    def get(self, reference: str) -> bytes:
        assert reference == "ref"
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


def services(data: bytes | Exception = DATA) -> Any:
    """As much of them as an answer is made of."""
    served = SimpleNamespace(student=fake_student())

    async def position(id: str) -> Position:
        return Position(4, 2.5)

    async def to_image(base_url: str, record: Record, index: int) -> Link:
        return Link(f"{base_url}{index}", 99)

    return SimpleNamespace(
        results=Results(data),
        producer=SimpleNamespace(position=position),
        links=SimpleNamespace(to_image=to_image, expires=lambda record: 77),
        models=SimpleNamespace(choice=SimpleNamespace(served={Name("fake", "1"): served})),
    )


def record(state: State = State.DONE, **changes: Any) -> Record:
    result = read_result(write_result(RESULT)) if state is State.DONE else {}
    known = Record(JOB.id, state, result, "ann", JOB.to_payload(), 100.9, 102.5, 104.9)
    return replace(known, **changes)


def test_a_job_that_is_done_tells_all_of_itself() -> None:
    status = asyncio.run(job_status(services(), record(), "http://h/", show_key=True)).model_dump(exclude_none=True)
    pictures = status.pop("data")
    assert status == {
        "id": JOB.id, "status": "done", "created": 100, "started": 102.5, "finished": 104.9, "expires_at": 77,
        "key": "ann", "model": "fake", "model_version": "1", "prompt": "a red heart", "seeds": [7, 9], "user": "u",
        "metadata": {"m": "n"}, "priority": -2, "cancelling": False, "runtime": "fake", "batch_size": 3,
        "timings": {
            "queue_s": 1.0, "inference_s": 2.0, "score_s": 0.25, "encode_s": 0.5, "total_s": pytest.approx(4.0),
        },
    }  # fmt: skip
    assert pictures[1] == {
        "url": "http://h/1", "expires_at": 99, "seed": 9, "width": 64, "height": 32, "sha256": SHA256,
        "reward": {"trained": 0.25, "heldout": 9.0}, "reward_percentile": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("state", "queued", "ended", "code"),
    [
        (State.QUEUED, True, False, None),
        (State.RUNNING, False, False, None),
        (State.EXPIRED, False, True, "deadline_exceeded"),
        (State.CANCELLED, False, True, "cancelled"),
        (State.FAILED, False, True, "generation_failed"),
    ],
)
def test_a_job_without_images_tells_where_it_is(state: State, queued: bool, ended: bool, code: str | None) -> None:
    status = asyncio.run(job_status(services(), record(state, giving_up=state is State.RUNNING), "http://h/"))
    assert status.key is None and status.data == [] and status.timings is None and status.runtime is None
    place = status.queue and (status.queue.position, status.queue.predicted_wait_s)
    assert (place, status.expires_at is not None) == ((4, 2.5) if queued else None, ended)
    assert (status.error.code if status.error else None) == code and status.cancelling == (state is State.RUNNING)


def test_a_failure_says_what_its_worker_said() -> None:
    told = failure(record(State.FAILED, result={"error": {"code": "storage_failed", "message": "No."}}))
    assert told and (str(told), told.code, told.status) == ("No.", "storage_failed", 500)
    assert failure(record()) is None
    codes = {state: failure(record(state)) for state in (State.EXPIRED, State.CANCELLED)}
    assert {state: error.status for state, error in codes.items() if error} == {
        State.EXPIRED: 504, State.CANCELLED: 409,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("frames", "state", "steps_done", "percent"),
    [(0, State.RUNNING, 2, None), (9, State.QUEUED, 0, 0), (9, State.RUNNING, 1, 25), (9, State.RUNNING, 4, 100),
     (9, State.DONE, 0, 100), (9, State.FAILED, 3, 0)],
)  # fmt: skip
def test_the_progress_of_a_video_is_the_share_of_its_steps(
    frames: int, state: State, steps_done: int, percent: int | None
) -> None:
    payload = replace(JOB, frames=frames).to_payload()
    assert progress_of(record(state, payload=payload, steps_done=steps_done)) == percent


def test_the_answer_of_a_request_has_its_images_in_base64_or_by_url() -> None:
    linked = asyncio.run(generated(services(), record(), "http://h/"))
    assert [image.url for image in linked.data] == ["http://h/0", "http://h/1"]
    assert (linked.id, linked.created, linked.model, linked.model_version) == (JOB.id, 100, "fake", "1")
    assert (linked.runtime, linked.batch_size, linked.rank_by, linked.ended_by) == ("fake", 3, None, None)
    inline = asyncio.run(
        generated(services(), record(payload=replace(JOB, response_format="b64_json").to_payload()), "http://h/")
    )
    assert [base64.b64decode(image.b64_json or "") for image in inline.data] == [DATA] * 2
    assert {(image.url, image.expires_at) for image in inline.data} == {(None, None)}


def test_a_file_says_in_headers_what_it_is() -> None:
    response = asyncio.run(image_file(services(), record(), 1))
    assert response.body == DATA and response.media_type == "image/webp"
    assert {name: value for name, value in response.headers.items() if not name.startswith("content-length")} == {
        "x-seed": "9", "x-model-version": "1", "content-disposition": f'inline; filename="{JOB.id}-1.webp"',
        "etag": f'"{SHA256}"', "x-content-type-options": "nosniff", "x-reward-score": "0.250000",
        "content-type": "image/webp",
    }  # fmt: skip
    unscored = read_result(write_result({**RESULT, "images": [{**IMAGE, "reward": {}, "below_floor": True}]}))
    headers = asyncio.run(image_file(services(), record(result=unscored), 0)).headers
    assert headers["x-below-floor"] == "true" and "x-reward-score" not in headers
    average = read_result(write_result({**RESULT, "images": [{**IMAGE, "seed": 0, "reward": {"trained": 0.0}}]}))
    headers = asyncio.run(image_file(services(), record(result=average), 0)).headers
    assert (headers["x-reward-score"], headers["x-seed"]) == ("0.000000", "0") and "x-below-floor" not in headers


@pytest.mark.parametrize(
    ("found", "code", "status"),
    [
        (ResultMissing("ref"), "result_missing", 500),
        (b"other bytes", "result_missing", 500),
        (b"", "result_missing", 500),
        (OSError("away"), StoreUnavailable().code, 503),
    ],
)
def test_bytes_that_are_gone_or_altered_are_not_sent(found: bytes | Exception, code: str, status: int) -> None:
    with pytest.raises(ServiceError) as refused:
        asyncio.run(image_file(services(found), record(), 0))
    assert (refused.value.code, refused.value.status) == (code, status)


def test_the_score_in_the_header_is_that_of_what_the_student_was_trained_on() -> None:
    student = fake_student()
    assert main_score(student, {"trained": 1.0, "heldout": 2.0}) == 1.0
    assert main_score(student, {"heldout": 2.0}) == 2.0 and main_score(student, {}) is None
    assert main_score(None, {"b": 2.0, "a": 3.0}) == 3.0, "the first by its name"
    assert main_score(student, {"another": 5.0, "trained": 4.0}) == 4.0


def test_every_candidate_counts_as_drawn() -> None:
    images = [{"candidates": [{}, {}, {}]}, {}, {"candidates": []}]
    assert drawn_images(record(result={"images": images})) == 5


def test_scores_are_where_the_record_says_and_a_word_of_a_later_release_says_nothing() -> None:
    words = ("pending", "done", "lost", "skipped", "", "dreamt")
    assert [scoring_of(record(scoring=word)) for word in words] == ["pending", "done", "lost", "skipped", None, None]


def test_the_total_time_is_from_acceptance_to_the_end() -> None:
    assert timings(record()).total_s == pytest.approx(4.0) and timings(record(finished_s=None)).total_s == 0.0


def test_how_images_were_chosen_is_told_only_where_they_were() -> None:
    floor = {
        "scorer": "trained", "min_reward": "p20", "asked_score": 0.5, "score": 0.25, "percentile": 10.0,
        "lowered": True, "utilization": 1.5, "of_a_later_release": 1,
    }  # fmt: skip
    payload = replace(JOB, candidates=4, rank_by="trained").to_payload()
    told = presentation.chosen(record(payload=payload, short="expired", result={"floor": floor}))
    assert (told["rank_by"], told["ended_by"]) == ("trained", "expired")
    assert told["floor"].model_dump() == {name: value for name, value in floor.items() if name != "of_a_later_release"}
    assert presentation.chosen(record()) == {"rank_by": None, "floor": None, "ended_by": None}
