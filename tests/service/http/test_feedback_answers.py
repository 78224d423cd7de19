"""What becomes of a word about an image before it is noted: whose it may be, and where the image ranks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import Conflict, NotFound
from service.http.feedback import FeedbackAnswer, FeedbackRequest, noted
from service.models.folder import Name
from service.quality.feedback import prompt_digest
from service.queue.job import Record
from service.queue.states import State
from student.runtimes.fake import fake_student
from tests.service.support import a_job

JOB = a_job(prompt="a red heart", may_train=True)
IMAGES = [{"reward_percentile": {"trained": 30.0, "heldout": 1.0, "unknown": 0.0}}, {"reward_percentile": {}}]
DONE = Record("i", State.DONE, {"images": IMAGES}, payload=JOB.to_payload())


def services(word: str = "ok", served: bool = True) -> tuple[Any, list[tuple[Any, ...]]]:
    kept: list[tuple[Any, ...]] = []

    async def note(*arguments: Any) -> str:
        kept.append(arguments)
        return word

    known = {Name("fake", "1"): SimpleNamespace(student=fake_student())} if served else {}
    return SimpleNamespace(
        feedback=SimpleNamespace(note=note), models=SimpleNamespace(choice=SimpleNamespace(served=known))
    ), kept


def say(record: Record = DONE, image: int = 0, **how: Any) -> tuple[FeedbackAnswer, tuple[Any, ...]]:
    them, kept = services(**how)
    answer = asyncio.run(noted(them, record, FeedbackRequest(feedback="rejected", image=image)))
    return answer, kept[0]


def test_an_image_ranks_by_what_may_be_trained_on_alone() -> None:
    answer, (id, image, word, digest, entry) = say()
    assert answer == FeedbackAnswer(id="i", image=0, feedback="rejected", trains=True)
    assert (id, image, word, digest) == ("i", 0, "rejected", prompt_digest("a red heart"))
    assert entry == {
        "prompt": "a red heart", "percentile": 30.0, "count": 1, "model": "fake", "version": "1", "steps": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("image", "served"), [(1, True), (0, False)])
def test_an_image_without_a_rank_is_in_the_middle(image: int, served: bool) -> None:
    _, (*_, entry) = say(image=image, served=served)
    assert entry["percentile"] == 50.0


def test_without_consent_the_word_is_noted_and_the_prompt_is_not() -> None:
    answer, (_, _, word, digest, _) = say(replace(DONE, payload=replace(JOB, may_train=False).to_payload()))
    assert (answer.trains, word, digest) == (False, "rejected", "")


def test_there_must_be_an_image() -> None:
    for state in (State.QUEUED, State.RUNNING, State.FAILED, State.CANCELLED, State.EXPIRED):
        with pytest.raises(Conflict, match=f"The job is {state}: there is no image"):
            say(replace(DONE, state=state))
    with pytest.raises(NotFound, match="The job has 2 images, counted from 0"):
        say(image=2)
    with pytest.raises(NotFound, match="no longer kept"):
        say(word="missing")


@pytest.mark.parametrize("fields", [{"image": 0}, {"feedback": "liked"}, {"feedback": "chosen", "image": 10}])
def test_a_word_is_one_of_three_about_one_of_ten_images(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FeedbackRequest(**fields)
    assert FeedbackRequest(feedback="chosen").image == 0 and FeedbackRequest(feedback="chosen", image=9).image == 9
