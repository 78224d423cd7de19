"""Whose jobs a caller sees, on which page, and what may be done with one: rules over what the queue's server has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import Conflict, InvalidRequest, NotFound, ServiceError, StoreUnavailable
from service.http import jobs
from service.queue.job import Record
from service.queue.states import State
from tests.service.support import a_job

FILE = "aa/" + "a" * 32 + "/{}/0.png"


def record(id: str = "a", *, state: State = State.DONE, created_s: float = 1.0, **fields: Any) -> Record:
    payload = a_job(id=id * 32).to_payload()
    usual: dict[str, Any] = {"result": {}, "key": "ann", "payload": payload, "created_s": created_s}
    return Record(id * 32, state, **{**usual, **fields})


OF = {
    "ann": [record("a", created_s=1.000001), record("b", created_s=3.5), record("c", created_s=5.0)],
    "bob": [record("d", created_s=2.0, key="bob"), record("e", created_s=4.0, key="bob")],
}


class Around:
    """A queue's server with the jobs of Ann and Bob, and a store."""

    def __init__(self, erases: str = "erased", away: bool = False) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.discarded: list[tuple[str, str]] = []
        self._erases, self._away = erases, away
        producer = SimpleNamespace(
            records=self._records, owners=self._owners, owned=self._owned, erase=self._erase, cancel=self._cancel
        )
        self.services: Any = SimpleNamespace(producer=producer, results=SimpleNamespace(discard=self._discard))

    async def _records(self, ids: Sequence[str]) -> dict[str, Record]:
        return {found.id: found for each in OF.values() for found in each if found.id in ids}

    async def _owners(self) -> list[str]:
        return list(OF)

    async def _owned(
        self, owner: str, limit: int, *, after_us: int | None, oldest_first: bool, wanted: Callable[[Record], bool]
    ) -> list[Record]:
        self.asked.append((owner, limit, after_us, oldest_first))
        found = sorted(OF[owner], key=lambda one: one.created_s, reverse=not oldest_first)
        return [one for one in found if wanted(one)][:limit]

    async def _erase(self, id: str) -> str:
        self.asked.append(("erase", id))
        return self._erases

    async def _cancel(self, id: str) -> None:
        self.asked.append(("cancel", id))

    def _discard(self, job: str, token: str) -> None:
        if self._away:
            raise OSError("away")
        self.discarded.append((job, token))


def page(around: Around, key: str | None, limit: int, cursor: str | None = None, **fields: Any) -> tuple[str, str]:
    """The first letters of the ids, and the cursor."""
    wanted = fields.pop("wanted", lambda found: True)
    found = asyncio.run(jobs.page_of(around.services, key, limit, cursor, wanted, **fields))
    return "".join(one.id[0] for one in found.records), found.cursor


def test_a_page_is_the_callers_newest_jobs_and_the_cursor_of_the_next() -> None:
    around = Around()
    assert page(around, "ann", 2) == ("cb", "3500000") and around.asked == [("ann", 3, None, False)]
    assert page(around, "ann", 3) == ("cba", ""), "there is no next page"
    assert page(around, "ann", 1, oldest_first=True) == ("a", "1000001"), "to the microsecond"


def test_an_operators_page_is_of_all_keys_in_one_order() -> None:
    around = Around()
    assert page(around, None, 3) == ("ceb", "3500000") and [asked[0] for asked in around.asked] == ["ann", "bob"]
    assert page(around, None, 9, oldest_first=True) == ("adbec", "")
    assert page(around, None, 9, wanted=lambda found: found.key == "bob") == ("ed", "")


def test_a_cursor_is_passed_on_and_nothing_else_is_one() -> None:
    around = Around()
    page(around, "ann", 2, "0" * 17 + "7")
    assert around.asked == [("ann", 3, 7, False)]
    for wrong in ("", "-1", "1.5", "x", "1" * 19, "1\n"):
        with pytest.raises(InvalidRequest, match="cursor must be the value of next") as caught:
            page(around, "ann", 2, wrong)
        assert caught.value.param == "cursor"


def test_what_another_release_wrote_is_on_no_page_and_moves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    later = record("b", created_s=3.5, payload="{}")
    monkeypatch.setitem(OF, "ann", [OF["ann"][0], later, OF["ann"][2]])
    assert page(Around(), "ann", 2) == ("c", "3500000")


def refused(call: Awaitable[Any]) -> ServiceError:
    async def run() -> Any:
        return await call

    with pytest.raises(ServiceError) as caught:
        asyncio.run(run())
    return caught.value


def test_a_job_is_found_by_its_owner_and_an_operator() -> None:
    for key in ("ann", None):
        assert asyncio.run(jobs.find(Around().services, "a" * 32, key)) is OF["ann"][0]


@pytest.mark.parametrize(("id", "key"), [("a" * 32, "bob"), ("a" * 32, ""), ("f" * 32, "ann"), ("f" * 32, None)])
def test_anothers_job_is_as_unknown_as_none(id: str, key: str | None) -> None:
    error = refused(jobs.find(Around().services, id, key))
    assert type(error) is NotFound and str(error) == "There is no such job, or it has expired."


@pytest.mark.parametrize("id", ["a" * 31, "A" * 32, "a" * 33, "../" + "a" * 29, ""])
def test_what_is_no_id_is_not_looked_for(id: str) -> None:
    around = Around()
    around.services.producer.records = None
    assert type(refused(jobs.find(around.services, id, None))) is NotFound


def test_what_this_version_cannot_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OF, "ann", [record("a", payload="{}")])
    assert type(refused(jobs.find(Around().services, "a" * 32, "ann"))) is NotFound


IMAGES = {"images": [{"file": FILE.format(3)}, {"file": FILE.format(3)}]}


@pytest.mark.parametrize(
    ("found", "index", "kind", "words"),
    [
        (record(state=State.QUEUED), 0, Conflict, "The job is queued: its images are not ready yet."),
        (record(state=State.RUNNING), 0, Conflict, "The job is running: its images are not ready yet."),
        (record(state=State.FAILED), 0, NotFound, "The job is failed: it has no images."),
        (record(state=State.CANCELLED), 0, NotFound, "The job is cancelled: it has no images."),
        (record(result=IMAGES), 2, NotFound, "The job has 2 images, counted from 0."),
    ],
)
def test_an_image_that_is_not_there_is_refused_and_why(
    found: Record, index: int, kind: type[ServiceError], words: str
) -> None:
    error = refused(jobs.image_of(Around().services, found, index))
    assert type(error) is kind and str(error) == words


@pytest.mark.parametrize(("raised", "kind"), [(StoreUnavailable(), StoreUnavailable), (NotFound("deleted"), NotFound)])
def test_an_expired_image_is_gone_and_one_whose_store_is_away_may_be_there(
    monkeypatch: pytest.MonkeyPatch, raised: ServiceError, kind: type[ServiceError]
) -> None:
    async def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(jobs, "image_file", fail)
    error = refused(jobs.image_of(Around().services, record(result=IMAGES), 1))
    assert type(error) is kind and (kind is StoreUnavailable or str(error) == "The image has expired and was deleted.")


def test_a_job_is_erased_with_the_files_of_every_claim() -> None:
    around = Around()
    previews = {"1:0": "aa/" + "a" * 32 + "/2/p1-0.webp", "2:0": "of another release"}
    asyncio.run(jobs.erased(around.services, record(result=IMAGES, previews=previews)))
    assert around.discarded == [("a" * 32, "2"), ("a" * 32, "3")] and around.asked == [("erase", "a" * 32)]


def test_a_job_that_is_gone_already_is_erased() -> None:
    asyncio.run(jobs.erased(Around("missing").services, record()))


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (record(state=State.QUEUED), "queued"),
        (record(state=State.RUNNING), "running"),
        (record(scoring="pending"), "to be scored"),
    ],
)
def test_a_job_that_goes_on_is_not_erased(found: Record, word: str) -> None:
    around = Around()
    error = refused(jobs.erased(around.services, found))
    assert type(error) is Conflict and str(error) == f"The job is {word}: it can be deleted once it has ended."
    assert around.asked == [] and around.discarded == []


def test_a_job_that_began_anew_meanwhile_is_not_erased() -> None:
    assert "The job is running" in str(refused(jobs.erased(Around("running").services, record())))


def test_where_the_store_is_away_the_record_stays() -> None:
    around = Around(away=True)
    error = refused(jobs.erased(around.services, record(result=IMAGES)))
    assert type(error) is StoreUnavailable and around.asked == []


def test_a_cancelled_job_is_read_again() -> None:
    around = Around()
    assert asyncio.run(jobs.cancelled(around.services, OF["ann"][0])) is OF["ann"][0]
    assert around.asked == [("cancel", "a" * 32)]
