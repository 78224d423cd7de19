"""How long a request waits for its job, what the queue is told afterwards, and versions that change meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import DeadlineExceeded, ModelGone, Unavailable
from service.http import generate as module
from service.http.generate import Caller, ClientGone, StillWaiting
from service.http.preferences import Preference
from service.http.schema import GenerateRequest
from service.http.submission import Submission
from service.models.choice import Served
from service.queue.job import QueueOptions, Record
from service.queue.states import State
from service.queue.status import Worker
from service.settings import Settings
from student.runtimes.fake import fake_student
from student.runtimes.sizes import SizeRange
from tests.service.support import a_job

JOB = a_job()
DONE = Record(JOB.id, State.DONE, {})
LONG_S, SHORT_S = 60.0, 0.01


class Waiting:
    """A request that waits for its job; ``away``: the queue's server is."""

    def __init__(self, says: str = "running", away: bool = False, **settings: Any) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._says, self._away = says, away
        verbs = {verb: self._hear(verb) for verb in ("detach", "cancel", "leave")}
        self.services: Any = SimpleNamespace(
            settings=Settings(runtime="fake", retry_grace_s=30.0, grace_s=0.0, **settings),
            producer=SimpleNamespace(records=self._records, **verbs),
            stopping=asyncio.Event(),
        )

    def _hear(self, verb: str) -> Any:
        async def hear(*arguments: Any) -> str:
            self.asked.append((verb, *arguments))
            if self._away:
                raise RedisConnectionError("away")
            return self._says

        return hear

    async def _records(self, ids: list[str]) -> dict[str, Record]:
        return {JOB.id: DONE}

    def attend(
        self, wait_s: int | float | None = None, *, ends: bool = False, gone: bool = False, **options: Any
    ) -> Record:  # fmt: skip
        submission = Submission(self.services, JOB, QueueOptions(**{"timeout_s": LONG_S, "client": "c", **options}))

        async def ended() -> Record:
            return DONE if ends else await asyncio.Event().wait()  # type: ignore[return-value]

        async def receive() -> Any:
            return {"type": "http.disconnect"} if gone else await asyncio.Event().wait()

        return asyncio.run(module._attend(submission, JOB.id, ended(), wait_s, receive))  # type: ignore[arg-type]


def test_the_end_is_answered_and_the_queue_has_nothing_to_hear() -> None:
    waiting = Waiting()
    assert waiting.attend(ends=True) is DONE and waiting.asked == []


def test_a_wait_that_is_over_before_the_deadline_leaves_the_job_to_be_fetched() -> None:
    waiting = Waiting()
    with pytest.raises(StillWaiting, match=JOB.id):
        waiting.attend(SHORT_S)
    assert waiting.asked == [("detach", JOB.id, "c")]


@pytest.mark.parametrize(("wait_s", "timeout_s"), [(None, SHORT_S), (LONG_S, SHORT_S), (SHORT_S, SHORT_S)])
def test_a_deadline_that_comes_first_ends_the_job_however_long_the_client_would_wait(
    wait_s: float | None, timeout_s: float
) -> None:
    waiting = Waiting()
    with pytest.raises(DeadlineExceeded, match=f"not ready within {timeout_s:g} s"):
        waiting.attend(wait_s, timeout_s=timeout_s)
    assert waiting.asked == [("cancel", JOB.id, "expired")]
    assert Waiting("done").attend(wait_s, timeout_s=timeout_s) is DONE, "earlier rounds have drawn pictures"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, [("leave", JOB.id, "c", 0.0)]),
        ({"idempotency": "digest"}, [("leave", JOB.id, "c", 30.0)]),
        ({"client": ""}, []),
    ],
)
def test_a_client_that_goes_is_told_to_the_queue_where_it_counts_as_one_that_waits(
    options: dict[str, str], told: list[tuple[Any, ...]]
) -> None:
    waiting = Waiting()
    with pytest.raises(ClientGone):
        waiting.attend(gone=True, **options)
    assert waiting.asked == told


def test_whoever_waits_when_the_service_ends_is_told_where_to_ask_later() -> None:
    waiting = Waiting(public_url="https://h/a")
    waiting.services.stopping.set()
    with pytest.raises(Unavailable) as told:
        waiting.attend()
    assert waiting.asked == [("detach", JOB.id, "c")]
    assert told.value.headers["Location"] == f"https://h/a/jobs/{JOB.id}" in str(told.value)


def test_a_queue_that_is_away_changes_no_answer() -> None:
    for error, options in (
        (StillWaiting, {"wait_s": SHORT_S}), (DeadlineExceeded, {"timeout_s": SHORT_S}), (ClientGone, {"gone": True}),
    ):  # fmt: skip
        with pytest.raises(error):
            Waiting(away=True).attend(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "refreshes", "answered"), [(0, 0, True), (1, 1, True), (3, 3, True), (4, 3, False)]
)
def test_a_request_whose_version_was_just_replaced_gets_what_is_served_now(
    changes: int, refreshes: int, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"latest": 0, "refreshed": 0}

    async def refresh() -> None:
        known["latest"], known["refreshed"] = min(changes, known["latest"] + 1), known["refreshed"] + 1

    async def once(services: Any, *_: Any) -> Any:
        if known["latest"] < changes:
            raise ModelGone("it was replaced")
        return "the answer"

    monkeypatch.setattr(module, "_generate", once)
    services: Any = SimpleNamespace(models=SimpleNamespace(refresh=refresh))
    asked = module.generate(services, None, None, None)  # type: ignore[arg-type]
    if answered:
        assert asyncio.run(asked) == "the answer"  # type: ignore[comparison-overlap]
    else:
        with pytest.raises(ModelGone):
            asyncio.run(asked)
    assert known["refreshed"] == refreshes


class Checked(Exception):
    """All checks were made."""


@pytest.mark.parametrize("score", ["always", "off"])
def test_a_request_is_checked_with_the_bounds_of_the_settings_and_what_is_served(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[Any, ...]] = {}

    async def check_length(services: Any, *arguments: Any) -> None:
        asked["length"] = arguments

    async def check_manner(services: Any, *arguments: Any) -> None:
        asked["manner"] = arguments
        raise Checked

    monkeypatch.setattr(module, "check", lambda *arguments: asked.update(all=arguments))
    monkeypatch.setattr(module, "check_length", check_length)
    monkeypatch.setattr(module, "_check_manner", check_manner)
    picked: list[tuple[Any, ...]] = []
    student, body = fake_student(), GenerateRequest(prompt="p", model="m", model_version="2", width=48, height=96)
    served = Served(student, len, sizes=((96, 32),))
    sides = {"sides_px": {"multiple_px": 16, "most_px": 128}}
    services: Any = SimpleNamespace(
        settings=Settings(runtime="fake", max_pixels=3, max_video_pixels=5, score=score),
        models=SimpleNamespace(choice=SimpleNamespace(pick=lambda *names: picked.append(names) or served)),
        producer=SimpleNamespace(
            workers=lambda: asyncio.sleep(0, [Worker("w", "r", "h", 8, False, {"fake/1": sides})])
        ),
    )
    caller = Caller("ann", "http://h/", "r", Preference(wait_s=3), None, 0)
    with pytest.raises(Checked):
        asyncio.run(module._generate(services, body, caller, None))  # type: ignore[arg-type]
    assert picked == [("m", "2")]
    assert asked["all"] == (student, body, len, 3, ((96, 32),), score != "off", SizeRange(16, 128), 5)
    assert asked["length"] == (served, body, (96, 48)), "height and width"
    assert asked["manner"] == (served, body, Preference(wait_s=3))
