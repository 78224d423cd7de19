"""How a request is queued, by what it says and by who asks; what is refused before; and the parts of its events."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.http import server
from service.http.events import COMPLETED, END, PREVIEW, QUEUED, SCORED, EventStream, events_of, last_of
from service.http.generate import Caller, _check_manner, _own_quota, _size_range, _submission, shows_steps
from service.http.openai.events import ABOUT, OpenAIStream
from service.http.openai.schema import ImageDatum
from service.http.preferences import Preference, digest, idempotency
from service.http.responses import GeneratedImage
from service.http.schema import GenerateRequest
from service.models.choice import Served
from service.observe.context import ANONYMOUS, RequestInfo, current_request
from service.queue.job import Position, QueueOptions, Record
from service.queue.result import read_result, write_result
from service.queue.states import State
from service.queue.status import Worker, WorkerState
from service.settings import Settings
from student.runtimes.fake import fake_student
from student.runtimes.sizes import SizeRange
from tests.service.http.test_presentation import DATA, IMAGE, JOB, RESULT, SHA256, record, services
from tests.service.support import a_job

SERVED = Served(fake_student(), lambda prompt: 1)
LATER = Preference(asynchronously=True)


def around(*workers: Worker, **settings: Any) -> Any:
    async def all_workers() -> tuple[Worker, ...]:
        return workers

    usual = {"runtime": "fake", "request_timeout_s": 11.0, "job_timeout_s": 13.0, "max_pending_per_key": 17}
    known = Settings(**{**usual, **settings})  # type: ignore[arg-type]
    return SimpleNamespace(settings=known, producer=SimpleNamespace(workers=all_workers))


def caller(**changes: Any) -> Caller:
    return replace(Caller("ann", "http://h/", "the request", Preference(), None, 5), **changes)


REPEATED = GenerateRequest(prompt="p", n=2)


@pytest.mark.parametrize(
    ("fields", "who", "options"),
    [
        ({}, {}, {"timeout_s": 11.0, "open_ended": True}),
        ({"timeout_s": 7.0}, {}, {"timeout_s": 7.0}),
        ({"stream": True}, {}, {"timeout_s": 11.0, "watched": True}),
        ({}, {"preference": LATER}, {"timeout_s": 13.0, "client": False}),
        ({"timeout_s": 7.0}, {"preference": LATER}, {"timeout_s": 7.0, "client": False}),
        ({}, {"preference": Preference(wait_s=3)}, {"timeout_s": 13.0}),
        ({}, {"preference": Preference(True, 3)}, {"timeout_s": 13.0, "client": False}),
        ({}, {"key": ANONYMOUS}, {"timeout_s": 11.0, "open_ended": True, "key_pending": 0}),
        ({"n": 2}, {"idempotency_key": "k"},
         {"timeout_s": 11.0, "idempotency": idempotency("k", "ann"), "body": digest(REPEATED)}),
    ],
)  # fmt: skip
def test_a_request_is_queued_as_it_says(fields: dict[str, Any], who: dict[str, Any], options: dict[str, Any]) -> None:
    submission = _submission(around(), SERVED, GenerateRequest(prompt="p", **fields), caller(**who))
    found = asdict(submission.options)
    client, waits = found.pop("client"), options.pop("client", True)
    assert (len(client) == 16) is waits and (client == "") is not waits
    usual = {**asdict(QueueOptions(0.0)), "key_pending": 17, **options}
    assert found == {name: value for name, value in usual.items() if name != "client"}
    assert (submission.job.key, submission.job.request_id) == (who.get("key", "ann"), "the request")


def test_a_keys_own_quota_and_consent_are_its_requests() -> None:
    def asked(info: RequestInfo | None) -> tuple[int | None, int | None, bool]:
        token = current_request.set(info)
        try:
            submission = _submission(around(), SERVED, GenerateRequest(prompt="p"), caller())
            return _own_quota(), submission.options.quota, submission.job.may_train
        finally:
            current_request.reset(token)

    known = RequestInfo("r")
    assert asked(None) == asked(known) == (None, None, False)
    known.quota, known.allow_training = 0.0165, True
    assert asked(known) == (16, 16, True), "in thousands"
    known.quota = 1e-6
    assert asked(known)[:2] == (1, 1), "the least quota, and not no limit"


@pytest.mark.parametrize(
    ("fields", "preference", "param"),
    [
        ({"stream": True}, LATER, "stream"),
        ({"stream": True}, Preference(wait_s=0), "stream"),
        ({"partial_images": 1}, Preference(), "partial_images"),
        ({"partial_images": 1}, LATER, None),
        ({"partial_images": 1}, Preference(wait_s=1), None),
        ({"partial_images": 1, "stream": True}, Preference(), None),
        ({}, LATER, None),
    ],
)
def test_previews_need_somebody_who_sees_them(
    fields: dict[str, Any], preference: Preference, param: str | None
) -> None:
    def check(*workers: Worker) -> None:
        asyncio.run(_check_manner(around(*workers), SERVED, GenerateRequest(prompt="p", **fields), preference))

    blind = Worker("w", "r", "h", 8, False)
    if param is None:
        check()
        if not fields:
            return check(blind)
    with pytest.raises(InvalidRequest) as refused:
        check(blind)
    assert refused.value.param == (param or "partial_images")


def test_previews_are_there_if_one_worker_has_them_or_may_yet_have() -> None:
    def shown(*workers: Worker) -> bool:
        return asyncio.run(shows_steps(around(*workers), SERVED.name))

    blind, sees = Worker("w", "r", "h", 8, False), Worker("v", "r", "h", 8, True)
    loading = replace(blind, state=WorkerState.LOADING)
    assert [shown(), shown(blind), shown(sees), shown(blind, sees), shown(loading), shown(blind, loading)] == [
        True, False, True, True, True, False,
    ]  # fmt: skip


def test_other_sizes_are_those_that_every_worker_with_the_student_draws() -> None:
    def found(size: str, *workers: Worker) -> SizeRange | None:
        return asyncio.run(_size_range(around(*workers), SERVED, GenerateRequest(prompt="p", size=size)))

    def worker(sides: dict[str, int] | None, name: str = "fake/1") -> Worker:
        return Worker("w", "r", "h", 8, False, {name: {"sides_px": sides} if sides else {}})

    any_side = {"multiple_px": 16, "most_px": 128}
    free, compiled, other = worker(any_side), worker(None), worker(None, "other/1")
    assert found("96x64", free) == found("96x64", free, free, other) == SizeRange(16, 128)
    assert found("96x64") is found("96x64", compiled) is found("96x64", free, compiled) is None
    assert found("64x64", free) is None, "its own size has a name"


def told(found: Record, form: type[EventStream] = EventStream, **known: Any) -> list[dict[str, Any]]:
    """What is sent of a record: the events' fields, with their numbers."""

    async def run() -> list[str]:
        stream = form(services(), found.id, "s", "http://h/", **known)
        return [text.decode() async for text in stream._unsent(found)]

    rows = []
    for text in asyncio.run(run()):
        fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
        data = json.loads(fields["data"])
        assert data.get("type") == fields["event"]
        rows.append({"number": int(fields["id"]) if "id" in fields else None, **data})
    return rows


PREVIEWED = {"0:0": "ref", "1:1": "ref"}
INLINE = replace(JOB, response_format="b64_json").to_payload()
SEEN = {"id": JOB.id, "created_at": 100, "size": "64x64"}


def test_each_event_of_a_job_tells_all_that_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.events.in_base64", told_file)
    queued, started, first, second, drawn, last, end = told(record(previews=PREVIEWED, payload=INLINE))
    assert queued == {"number": QUEUED, "type": "queued", "id": JOB.id, "position": None, "predicted_wait_s": None}
    assert started["queue_s"] == pytest.approx(1.6) and started["id"] == JOB.id
    assert first == {
        "number": PREVIEW, "type": "image_generation.partial_image", **SEEN, "output_format": "ref",
        "partial_image_index": 0, "index": 0, "b64_json": "ref ",
    }  # fmt: skip
    assert (second["number"], second["partial_image_index"], second["index"]) == (2 * PREVIEW + 1, 1, 1)
    assert drawn == {
        "number": COMPLETED, "type": "image_generation.completed", **SEEN, "output_format": "ref", "index": 0,
        **{name: IMAGE[name] for name in ("seed", "width", "height", "sha256", "reward")},
        "b64_json": f"ref {SHA256}",
    }  # fmt: skip
    assert (last["number"], last["index"], last["seed"]) == (COMPLETED + 1, 1, 9)
    assert (end["number"], end["type"], end["job"]["status"], "error" in end) == (END, "done", "done", False)


async def told_file(_: Any, reference: str, sha256: str = "") -> str:
    return f"{reference} {sha256}"


def test_images_by_url_are_linked_once_they_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.events.in_base64", told_file)
    found = {row["number"]: row for row in told(record(previews=PREVIEWED))}
    assert found[COMPLETED + 1]["url"] == "http://h/1" and found[COMPLETED + 1]["expires_at"] == 99
    assert "b64_json" not in found[COMPLETED + 1] and found[PREVIEW]["b64_json"] == "ref "


@pytest.mark.parametrize(
    ("state", "code"), [(State.FAILED, "generation_failed"), (State.CANCELLED, "cancelled"),
                        (State.EXPIRED, "deadline_exceeded")],
)  # fmt: skip
def test_what_ends_without_images_tells_its_reason(state: State, code: str) -> None:
    *_, end = told(record(state))
    assert (end["number"], end["type"], end["error"]["code"], end["job"]["error"]["code"]) == (END, "error", code, code)


def test_whoever_has_seen_some_is_told_the_rest_and_where_a_job_is_has_no_number() -> None:
    assert [row["number"] for row in told(record(), after=COMPLETED)] == [COMPLETED + 1, END]
    waiting = record(State.QUEUED, claimed_s=None)
    assert told(waiting) == [
        {"number": QUEUED, "type": "queued", "id": JOB.id, "position": 4, "predicted_wait_s": 2.5}
    ]  # fmt: skip
    assert [row["number"] for row in told(waiting, after=QUEUED)] == [None]
    video = replace(JOB, frames=9).to_payload()
    running = record(State.RUNNING, payload=video, steps_done=1)
    assert told(running, after=1) == [
        {"number": None, "type": "progress", "id": JOB.id, "step": 1, "steps": 4, "progress": 25}
    ]


def test_a_place_is_told_again_only_where_it_has_changed() -> None:
    known = services()
    stream = EventStream(known, JOB.id, "s", "http://h/")

    async def positions() -> list[int]:
        found = []
        for place in (4, 4, 3):
            known.producer.position = lambda id, place=place: asyncio.sleep(0, Position(place, 1.0))
            async for text in stream._unsent(record(State.QUEUED, claimed_s=None)):
                found.append(json.loads(text.decode().partition("data: ")[2].partition("\n")[0])["position"])
        return found

    assert asyncio.run(positions()) == [4, 3]


@pytest.mark.parametrize(
    ("scoring", "state", "last", "told_last"),
    [("", State.DONE, END, END), ("pending", State.DONE, SCORED, END), ("done", State.DONE, SCORED, SCORED),
     ("lost", State.DONE, SCORED, SCORED)],
)  # fmt: skip
def test_scores_that_come_later_are_the_last_event(scoring: str, state: State, last: int, told_last: int) -> None:
    found = record(state, scoring=scoring)
    events = events_of(found)
    assert (last_of(found), events[-1].number) == (last, told_last)
    if told_last == SCORED:
        scores = [{"index": k, "seed": seed, "reward": IMAGE["reward"]}
                  for k, seed in enumerate((7, 9))]  # fmt: skip
        assert events[-1].data == {"scoring": scoring, "data": scores}


def test_an_image_that_has_expired_is_left_out_and_the_rest_is_told() -> None:
    """Its bytes are others: a client sees the end, and no picture that is not the one that was drawn."""
    broken = read_result(write_result({**RESULT, "images": [{**IMAGE, "sha256": "0" * 64}] * 2}))
    numbers = [row["number"] for row in told(record(result=broken, payload=INLINE))]
    assert numbers == [QUEUED, 1, END] and DATA


def test_openais_clients_are_told_of_images_and_errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.openai.events.in_base64", told_file)
    known = {"background": "opaque", "output_format": "webp", "quality": "high", "size": "64x64"}
    monkeypatch.setattr("service.http.openai.events.described", lambda *_: known)
    usage = SimpleNamespace(model_dump=lambda: {"total_tokens": 3})
    monkeypatch.setattr("service.http.openai.events.usage", lambda _s, _j, drawn: usage if drawn == 1 else None)
    rows = told(record(previews={"0:0": "ref"}, payload=INLINE, scoring="pending"), OpenAIStream)
    assert [row["number"] for row in rows] == [PREVIEW, COMPLETED, COMPLETED + 1]
    about = {"id": JOB.id, "created_at": 100, **known}
    assert rows[0] == {
        "number": PREVIEW, "type": "image_generation.partial_image", **about, "b64_json": "ref ",
        "partial_image_index": 0,
    }  # fmt: skip
    assert rows[1] == {
        "number": COMPLETED, "type": "image_generation.completed", **about, "b64_json": f"ref {SHA256}",
        "usage": {"total_tokens": 3}, "seed": 7, "reward": IMAGE["reward"],
        "scoring": "pending",
    }  # fmt: skip
    [error] = told(record(State.CANCELLED), OpenAIStream)
    assert error["error"]["code"] == "cancelled" and "job" not in error
    assert (EventStream.scores, OpenAIStream.scores) == (True, False)


def test_a_server_is_run_with_these_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[tuple[Any, float]] = []

    class Noted:
        def __init__(self, config: Any, app: Any, drain_s: float) -> None:
            found.append((config, drain_s))

        def run(self, sockets: list[socket.socket]) -> None:
            assert sockets == [listener]

    handled: list[int] = []
    monkeypatch.setattr(server, "Server", Noted)
    monkeypatch.setattr(server.signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(server, "raise_descriptor_limit", lambda: 1000)
    settings = Settings(
        runtime="fake", redis_url="redis://127.0.0.1:1", data_dir=tmp_path, drain_s=3.0, grace_s=4.2, head_timeout_s=5.0
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.run_server(settings, listener)
    [(config, drain_s)] = found
    assert (config.timeout_graceful_shutdown, config.timeout_keep_alive, config.limit_concurrency) == (6, 75, 872)
    assert (config.ws, config.server_header, config.access_log, drain_s) == ("none", False, False, 3.0)
    assert config.http.head_timeout_s == 5.0 and set(handled) == {server.signal.SIGINT, server.signal.SIGTERM}


@pytest.mark.parametrize(
    ("soft", "hard", "limit", "asked"),
    [
        (1024, 4096, 4096, 4096), (1024, 1_000_000, 65536, 65536), (100_000, 1_000_000, 100_000, None),
        (-1, -1, 65536, None), (1024, -1, 65536, 65536),
    ],
)  # fmt: skip
def test_as_many_descriptors_as_clients_may_need_are_asked_for(
    soft: int, hard: int, limit: int, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[tuple[int, int]] = []
    known = SimpleNamespace(
        RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda _: (soft, hard),
        setrlimit=lambda _, limits: wanted.append(limits),
    )  # fmt: skip
    monkeypatch.setattr(server, "resource", known)
    assert server.raise_descriptor_limit() == limit and wanted == ([] if asked is None else [(asked, hard)])


def test_the_first_signal_stops_new_requests_after_the_drain_and_the_second_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(server.uvicorn.Server, "handle_exit", lambda self, sig, frame: exits.append(sig))
    stopping = asyncio.Event()
    app: Any = SimpleNamespace(state=SimpleNamespace(services=SimpleNamespace(stopping=stopping)))
    later: list[tuple[Any, ...]] = []

    async def signals() -> None:
        known = server.Server(server.uvicorn.Config(app), app, 3.0)
        loop = SimpleNamespace(call_later=lambda *call: later.append(call))
        monkeypatch.setattr(server.asyncio, "get_running_loop", lambda: loop)
        known.handle_exit(15, None)
        assert stopping.is_set() and exits == [] and later[0][0] == 3.0
        later[0][1](*later[0][2:])
        assert exits == [15]
        known.handle_exit(2, None)
        monkeypatch.undo()

    asyncio.run(signals())
    assert exits == [15, 2] and len(later) == 1
    assert a_job().key == ANONYMOUS


@pytest.mark.parametrize(
    ("asked", "heard", "told"),
    [
        (True, [None, record(State.RUNNING), None], [1, END]),
        (True, [record(State.RUNNING), record(State.CANCELLED)], [1, END]),
        (False, [None, record(State.RUNNING), None], [1]),
        (True, [], [END]),
    ],
)
def test_a_stream_whose_job_is_lost_at_its_deadline_says_so_to_who_has_asked_for_it(
    asked: bool, heard: list[Record | None], told: list[int]
) -> None:
    """And to nobody else: a watcher may come again, and the job may go on."""
    followed: list[tuple[Any, ...]] = []
    known, submission = services(), SimpleNamespace(enqueue=object(), options=SimpleNamespace(timeout_s=5.0))

    async def follow(id: str, enqueue: Any, *, within_s: float, scores: bool) -> AsyncIterator[Record | None]:
        followed.append((id, enqueue, within_s, scores))
        for each in heard:
            yield each

    known.replies = SimpleNamespace(follow=follow)
    found: Any = submission if asked else None
    stream = EventStream(known, JOB.id, "s", "http://h/", after=QUEUED, submission=found)

    async def texts() -> list[str]:
        return [text.decode() async for text in stream._texts()]

    parts = [dict(line.split(": ", 1) for line in text.strip().splitlines()) for text in asyncio.run(texts()) if text]
    assert [int(part["id"]) for part in parts] == told
    assert followed == [(JOB.id, submission.enqueue, 7.0, True) if asked else (JOB.id, None, math.inf, True)]
    if told[-1] == END:
        code = "cancelled" if len(heard) == 2 else "deadline_exceeded"
        assert (parts[-1]["event"], json.loads(parts[-1]["data"])["error"]["code"]) == ("error", code)


def test_an_event_tells_of_an_image_all_that_an_answer_does() -> None:
    """A field that is added to the one is forgotten in the other."""
    of_scores = {"reward_percentile": {}, "reward_failed": [], "reward_worst": {}, "worst_frame": {}}
    rest = {"num_frames": 5, "fps": 8, "steps": 2, "reported": {}, "below_floor": False, "candidates": []}
    result = {"images": [{**IMAGE, **of_scores, **rest, "of_a_later_release": 1}]}
    *_, completed, _, scored = events_of(record(result=result, scoring="done"))
    where = {"b64_json", "url", "expires_at"}
    assert set(completed.data) == {"index", *GeneratedImage.model_fields} - where and completed.file == IMAGE["file"]
    [row] = scored.data["data"]
    assert set(row) == {"index", "seed", "reward", *of_scores}
    assert set(ABOUT) == set(ImageDatum.model_fields) - where
