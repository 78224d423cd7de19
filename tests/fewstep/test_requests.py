"""What both clients put on the wire for each method, and what they make of the answer; no service."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from fewstep.answers import Event
from fewstep.async_client import AsyncClient
from fewstep.client import Client
from fewstep.errors import Busy, FewstepError, JobFailed, NotFound, Unreachable
from fewstep.retries import Retries
from tests.fewstep.sleeping import instead_of_sleep

URL = "http://service.example:8000"
ONCE = Retries(tries=1)
JOB: dict[str, Any] = {
    "id": "j", "status": "done", "created": 0, "model": "m", "model_version": "1", "prompt": "p", "seeds": [1],
}  # fmt: skip
PICTURE = {"seed": 7, "width": 64, "height": 64, "sha256": "", "reward": {}}
TIMES = {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 0.0, "total_s": 0.0}
ANSWER = {
    "id": "a", "created": 0, "model": "m", "model_version": "1", "runtime": "r", "batch_size": 1, "data": [PICTURE],
    "timings": TIMES,
}  # fmt: skip
KEYED = {"idempotency-key": "k"}
EVENTS = "id: 1\nevent: started\ndata: {}\n\nid: 2\nevent: done\ndata: {}\n\n"

Answer = httpx.Response | Exception


class Wire:
    """Answers in order, the last one again and again; notes what was asked, and how long was slept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> None:
        self.asked: list[httpx.Request] = []
        self.slept: list[float] = []
        self._answers = list(answers)
        instead_of_sleep(monkeypatch, self.slept.append)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def run(self, asynchronous: bool, use: Callable[[Any], Any], **options: Any) -> Any:
        """What ``use`` returns of a client; of events, all of them."""
        options = {"retries": ONCE, **options}
        if not asynchronous:
            with Client(URL, "key", transport=httpx.MockTransport(self), **options) as client:
                found = use(client)
                return list(found) if isinstance(found, Iterator) else found

        async def run() -> Any:
            async with AsyncClient(URL, "key", transport=httpx.MockTransport(self), **options) as client:
                found = use(client)
                if isinstance(found, AsyncIterator):
                    return [event async for event in found]
                return await found if isinstance(found, Awaitable) else found

        return asyncio.run(run())

    def sent(self) -> list[tuple[str, str, Any, dict[str, str]]]:
        """Method, path with query, body and the headers that a client adds of its own."""
        usual = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host"}
        return [
            (
                request.method,
                request.url.raw_path.decode(),
                json.loads(request.content) if request.content else None,
                {
                    name: value
                    for name, value in request.headers.items()
                    if name not in usual | {"authorization", "user-agent"}
                },
            )
            for request in self.asked
        ]


def ok(body: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=body)


def stream(text: str, status: int = 200) -> httpx.Response:
    return httpx.Response(status, text=text, headers={"Content-Type": "text/event-stream"})


METHODS: list[tuple[Callable[[Any], Any], Answer, tuple[str, str, Any, dict[str, str]]]] = [
    (lambda c: c.generate("p", idempotency_key="k", n=2), ok(ANSWER),
     ("POST", "/generate", {"prompt": "p", "n": 2}, KEYED)),
    (lambda c: c.submit("p", idempotency_key="k", seed=3), ok(JOB, 202),
     ("POST", "/generate", {"prompt": "p", "seed": 3}, {**KEYED, "prefer": "respond-async"})),
    (lambda c: c.job("j"), ok(JOB), ("GET", "/jobs/j", None, {})),
    (lambda c: c.jobs(), ok({"data": [JOB]}), ("GET", "/jobs?limit=20", None, {})),
    (lambda c: c.jobs(5, status=["done", "failed"], everybody=True), ok({"data": []}),
     ("GET", "/jobs?status=done&status=failed&all=true&limit=5", None, {})),
    (lambda c: c.cancel("j"), ok(JOB), ("POST", "/jobs/j/cancel", None, {})),
    (lambda c: c.feedback("j", "chosen"), ok({"id": "j", "image": 0, "feedback": "chosen", "trains": False}),
     ("POST", "/jobs/j/feedback", {"feedback": "chosen", "image": 0}, {})),
    (lambda c: c.feedback("j", "rejected", 3), ok({"id": "j", "image": 3, "feedback": "rejected", "trains": True}),
     ("POST", "/jobs/j/feedback", {"feedback": "rejected", "image": 3}, {})),
    (lambda c: c.image("j"), httpx.Response(200, content=b"x"), ("GET", "/jobs/j/images/0", None, {})),
    (lambda c: c.image("j", 2), httpx.Response(200, content=b"x"), ("GET", "/jobs/j/images/2", None, {})),
    (lambda c: c.models(), ok({"data": [{"id": "m"}]}), ("GET", "/v1/models", None, {})),
    (lambda c: c.operate("GET", "admin/dlq", limit=4), ok({"data": []}), ("GET", "/admin/dlq?limit=4", None, {})),
    (lambda c: c.operate("POST", "admin/x", wait_s=2.5), ok({}), ("POST", "/admin/x?wait_s=2.5", None, {})),
    (lambda c: c.wait("j"), ok(JOB), ("GET", "/jobs/j", None, {})),
    (lambda c: c.events("j"), stream(EVENTS), ("GET", "/jobs/j/events", None, {})),
    (lambda c: c.events("j", 4), stream(EVENTS), ("GET", "/jobs/j/events", None, {"last-event-id": "4"})),
    (lambda c: c.events("j", after=0), stream(EVENTS), ("GET", "/jobs/j/events", None, {"last-event-id": "0"})),
]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("use", "answer", "sent"), METHODS)
def test_each_method_is_one_request(
    use: Callable[[Any], Any],
    answer: Answer,
    sent: tuple[Any, ...],
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire = Wire(monkeypatch, answer)
    wire.run(asynchronous, use)
    assert wire.sent() == [sent] and wire.slept == []
    [request] = wire.asked
    assert (request.url.host, request.headers["authorization"]) == ("service.example", "Bearer key")
    assert request.headers["user-agent"] == "fewstep-python"
    assert (request.headers["accept"] == "text/event-stream") is request.url.path.endswith("/events")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_are_returned_as_what_they_are(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(answer: Answer, use: Callable[[Any], Any]) -> Any:
        return Wire(monkeypatch, answer).run(asynchronous, use)

    assert found(ok(ANSWER), lambda c: c.generate("p")).data[0].seed == 7
    assert found(ok({"data": [JOB, JOB]}), lambda c: c.jobs())[1].id == "j"
    assert found(ok({"data": [{"id": "m", "more": 1}]}), lambda c: c.models())[0].more == 1
    assert found(httpx.Response(200, content=b"\x89PNG"), lambda c: c.image("j")) == b"\x89PNG"
    assert found(ok({"a": [1]}), lambda c: c.operate("GET", "x")) == {"a": [1]}
    events = found(stream(EVENTS), lambda c: c.events("j"))
    assert events == [Event(name="started", number=1, data={}), Event(name="done", number=2, data={})]
    with pytest.raises(NotFound, match="^No.$"):
        found(ok({"error": {"message": "No."}}, 404), lambda c: c.job("j"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_submits_with_its_options_and_follows(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch, ok(JOB, 202), stream(EVENTS))
    events = wire.run(asynchronous, lambda c: c.stream("p", idempotency_key="k", partial_images=2))
    assert [event.name for event in events] == ["started", "done"]
    assert wire.sent() == [
        ("POST", "/generate", {"prompt": "p", "partial_images": 2}, {**KEYED, "prefer": "respond-async"}),
        ("GET", "/jobs/j/events", None, {}),
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_is_tried_again_after_the_pause_and_the_last_error_is_raised(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = httpx.Response(503, json={"error": {"message": "Full."}}, headers={"Retry-After": "7"})
    wire = Wire(monkeypatch, busy, httpx.ConnectError("refused"), ok(JOB))
    assert wire.run(asynchronous, lambda c: c.job("j"), retries=None).id == "j"
    assert wire.slept[0] == 7.0 and 0.5 <= wire.slept[1] <= 1.0, "the second pause doubles the first"
    assert len(wire.asked) == 3
    wire = Wire(monkeypatch, busy)
    with pytest.raises(Busy, match="Full"):
        wire.run(asynchronous, lambda c: c.job("j"), retries=None)
    assert (len(wire.asked), wire.slept) == (4, [7.0, 7.0, 7.0])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_waiting_asks_for_the_job_before_and_after_its_events(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = {**JOB, "status": "running"}
    failed = 'event: error\ndata: {"error": {"message": "No.", "code": "c"}}\n\n'
    for text, status in ((EVENTS, "done"), (failed, "failed")):
        wire = Wire(monkeypatch, ok(running), stream(text), ok({**JOB, "status": status}))
        assert wire.run(asynchronous, lambda c: c.wait("j", timeout_s=60.0)).status == status
        assert [path for _, path, _, _ in wire.sent()] == ["/jobs/j", "/jobs/j/events", "/jobs/j"]
    with pytest.raises(JobFailed, match="No.") as caught:
        Wire(monkeypatch, stream(failed)).run(asynchronous, lambda c: c.events("j"))
    assert caught.value.code == "c"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_goes_on_where_it_broke_and_each_event_gives_it_its_tries_back(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tries, and five breaks: behind the first numbered event, a place in the queue, an error of the service."""
    full = httpx.Response(503, json={"error": {"message": "Full."}}, headers={"Retry-After": "3"})
    wire = Wire(
        monkeypatch,
        stream("id: 1\nevent: queued\ndata: {}\n\nid: 9\nevent: half"),
        stream('event: queued\ndata: {"position": 1}\n\n'), full, stream("event: progress\ndata: {}\n\n"),
        httpx.ReadError("reset"), stream("\nid: 2\nevent: done\ndata: {}\n\n"),
    )  # fmt: skip
    events = wire.run(asynchronous, lambda c: c.events("j"), retries=Retries(tries=3))
    assert [(event.name, event.number) for event in events] == [
        ("queued", 1), ("queued", None), ("progress", None), ("done", 2),
    ]  # fmt: skip
    assert [request.headers.get("last-event-id") for request in wire.asked] == [None, "1", "1", "1", "1", "1"]
    assert wire.slept[2] == 3.0 and len(wire.slept) == 5
    gone = Wire(monkeypatch, httpx.ReadError("reset"))
    with pytest.raises(Unreachable, match=r"^The event stream broke off: reset\.$"):
        gone.run(asynchronous, lambda c: c.events("j"), retries=Retries(tries=2))
    assert len(gone.asked) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_of_which_nothing_is_left_is_over(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch, httpx.Response(204))
    assert wire.run(asynchronous, lambda c: c.events("j", 9)) == [] and len(wire.asked) == 1
    refused = Wire(monkeypatch, ok({"error": {"message": "There is no such job."}}, 404))
    with pytest.raises(NotFound, match="no such job"):
        refused.run(asynchronous, lambda c: c.events("j"), retries=Retries(tries=5))
    assert len(refused.asked) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_how_long_is_waited_for_an_answer(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def timeouts(use: Callable[[Any], Any], answer: Answer, **options: Any) -> tuple[float, float]:
        wire = Wire(monkeypatch, answer)
        wire.run(asynchronous, use, **options)
        found = wire.asked[0].extensions["timeout"]
        return found["connect"], found["read"]

    assert timeouts(lambda c: c.job("j"), ok(JOB)) == (10.0, 120.0)
    assert timeouts(lambda c: c.job("j"), ok(JOB), timeout_s=7.0) == (10.0, 7.0)
    assert timeouts(lambda c: c.generate("p", timeout_s=300.0), ok(ANSWER)) == (10.0, 310.0)
    assert timeouts(lambda c: c.generate("p"), ok(ANSWER), timeout_s=7.0) == (10.0, 7.0)
    assert timeouts(lambda c: c.submit("p", timeout_s=300.0), ok(JOB)) == (10.0, 120.0)
    assert timeouts(lambda c: c.operate("GET", "x"), ok({})) == (10.0, 30.0)
    assert timeouts(lambda c: c.operate("POST", "x", wait_s=90.0), ok({})) == (10.0, 120.0)
    assert timeouts(lambda c: c.events("j"), stream(EVENTS)) == (10.0, 60.0)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in vars(kind).items()
            if not name.startswith("_") and callable(method)
        }

    assert methods(Client) == methods(AsyncClient) and len(methods(Client)) == 13


def test_whose_address_was_called_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "x" * 300
    transport = httpx.MockTransport(Wire(monkeypatch, httpx.ConnectError(reason)))
    with Client("http://ann:secret@service.example:1/base", retries=ONCE, transport=transport) as client:
        with pytest.raises(FewstepError) as caught:
            client.models()
    assert str(caught.value) == f"The service cannot be reached at http://service.example:1: {'x' * 200}."
