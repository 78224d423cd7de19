"""Spans through the queue: one trace from a request to its picture, and a batch that knows all its requests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from service.errors import StartupError
from service.http.app import build_app
from service.observe.spans import EXPORTER, OpenTelemetry
from service.observe.tracer import Role, Tracing
from service.observe.tracing import open_tracing
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.results.folder import FolderStore
from service.settings import Settings
from service.supervise.redis_server import EmbeddedServer
from service.worker.heartbeat import Heartbeat
from service.worker.worker import Worker
from student.runtimes.fake import FakeRuntime
from tests.service.support import REPOSITORY, a_job, check_answer

INCOMING = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """One server, an API and a worker in this process, and the spans that both have ended."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = OpenTelemetry(provider)
        self.settings = Settings(runtime="fake", redis_url=redis_url, data_dir=folder / "data")
        self.worker = self._worker(redis_url)

    def _worker(self, redis_url: str) -> Worker:
        runtime = FakeRuntime()
        limits = {"lease_s": 60.0, "max_attempts": 3}
        consumer, beater = (Consumer(connect(redis_url), "fake", "w", **limits) for _ in range(2))  # type: ignore[arg-type]
        store = FolderStore(self.settings.results_dir)
        info = {"runtime": "fake", "host": "h", "max_batch": 8}
        heartbeat = Heartbeat(beater, info, 60.0)
        return Worker(runtime, consumer, heartbeat, store, threading.Event(), tracing=self.tracing)

    def ask(self, prompts: list[str], headers: dict[str, str]) -> list[httpx.Response]:
        """Caller for all at once, have them drawn as one batch, and take the answers."""

        async def run() -> list[httpx.Response]:
            app = build_app(self.settings, self.tracing)
            transport = httpx.ASGITransport(app)
            async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
                url = "http://localhost/generate"
                bodies = [{"prompt": prompt, "seed": 1} for prompt in prompts]
                asked = [asyncio.create_task(client.post(url, json=body, headers=headers)) for body in bodies]
                while (await app.state.services.producer.depth()).waiting < len(prompts):
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(self.worker.step)
                return list(await asyncio.gather(*asked))

        return asyncio.run(run())

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    yield Traced(server.url, tmp_path)
    server.stop()


def ids(spans: list[ReadableSpan]) -> set[tuple[int, int]]:
    return {(span.context.trace_id, span.context.span_id) for span in spans if span.context}


def test_a_batch_is_linked_to_the_senders_of_all_its_mates_and_each_trace_to_the_batch(traced: Traced) -> None:
    prompts = ["one", "two", "three"]
    for prompt, answer in zip(prompts, traced.ask(prompts, {}), strict=True):
        assert answer.status_code == 200, answer.text
        check_answer(answer.json(), prompt, [1])
    requests, sends = traced.spans("POST /generate"), traced.spans("send job")
    [batch] = traced.spans("process batch")
    shares = traced.spans("process job")
    assert [len(spans) for spans in (requests, sends, shares)] == [3, 3, 3]
    assert len({span.context.trace_id for span in requests if span.context}) == 3
    assert {span.kind for span in requests} == {SpanKind.SERVER} and batch.kind is SpanKind.CONSUMER
    assert {span.kind for span in sends} == {SpanKind.PRODUCER}
    assert {(s.parent.trace_id, s.parent.span_id) for s in sends if s.parent} == ids(requests)
    assert {(link.context.trace_id, link.context.span_id) for link in batch.links} == ids(sends)
    assert batch.parent is None and batch.attributes and batch.attributes["messaging.batch.message_count"] == 3
    assert {(s.parent.trace_id, s.parent.span_id) for s in shares if s.parent} == ids(sends)
    assert {(link.context.trace_id, link.context.span_id) for s in shares for link in s.links} == ids([batch])
    by_name = [traced.spans(name) for name in ("draw", "score", "settle")]
    stages = [span for spans in by_name for span in spans]
    assert [len(spans) for spans in by_name] == [1, 1, 1]
    assert {(s.parent.trace_id, s.parent.span_id) for s in stages if s.parent} == ids([batch])


def test_the_callers_own_trace_goes_on(traced: Traced) -> None:
    traced.ask(["p"], {"traceparent": INCOMING})
    [request], [share] = traced.spans("POST /generate"), traced.spans("process job")
    assert request.parent and f"{request.parent.span_id:016x}" == INCOMING.split("-")[2]
    assert share.context and f"{share.context.trace_id:032x}" == INCOMING.split("-")[1]


def test_a_traceparent_that_makes_no_sense_does_no_harm(traced: Traced) -> None:
    [answer] = traced.ask(["p"], {"traceparent": "rubbish"})
    assert answer.status_code == 200 and len(traced.spans("process batch")) == 1


def test_no_span_holds_a_prompt(traced: Traced) -> None:
    traced.ask(["a canary"], {})
    assert "a canary" not in "".join(span.to_json() for span in traced.exporter.get_finished_spans())


def test_without_being_asked_for_it_there_is_no_tracing() -> None:
    assert type(open_tracing(Settings(), "api")) is Tracing
    # redis-py imports OpenTelemetry by itself where it is installed; the service does not.
    code = "import sys, service.http.server, service.worker.process; print('service.observe.spans' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(StartupError, match=r"needs the extra otel, .* is not installed\)\.$") as caught:
        open_tracing(Settings(tracing=True), "api")
    assert "\n" not in str(caught.value)


def provided() -> tuple[OpenTelemetry, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetry(provider), exporter


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


@pytest.mark.parametrize(("status", "error"), [(200, False), (404, False), (499, False), (500, True), (503, True)])
def test_a_requests_span_says_how_it_was_answered(status: int, error: bool) -> None:
    tracing, exporter = provided()
    with tracing.request("GET", {"traceparent": INCOMING, "tracestate": "a=b"}) as trace_id:
        tracing.answered("/jobs/{id}", "GET", status)
    [span] = exporter.get_finished_spans()
    assert trace_id == INCOMING.split("-")[1] and span.context and span.context.trace_state.get("a") == "b"
    assert (span.name, span.status.is_ok) == ("GET /jobs/{id}", not error)
    assert attributes(span) == {
        "http.request.method": "GET", "http.route": "/jobs/{id}", "http.response.status_code": status,
    }  # fmt: skip


def test_spans_of_the_queue_have_the_names_that_collectors_know() -> None:
    tracing, exporter = provided()
    jobs = [a_job(id=letter * 32) for letter in "ab"]
    with tracing.publish(jobs[0]) as traceparent:
        pass
    batch = tracing.batch("b7", [replace(jobs[0], traceparent=traceparent), replace(jobs[1], traceparent="")])
    batch.begin("draw")()
    batch.end()
    named = {span.name: span for span in exporter.get_finished_spans()}
    assert list(named) == ["send job", "draw", "process batch", "process job"], "one share: the other has no trace"
    send = {"messaging.system": "fewstep", "messaging.operation.type": "send", "messaging.message.id": "a" * 32}
    assert attributes(named["send job"]) == send
    assert named["send job"].context and f"{named['send job'].context.span_id:016x}" == traceparent.split("-")[2]
    assert attributes(named["process batch"]) == {
        "messaging.system": "fewstep", "messaging.operation.type": "process", "messaging.batch.message_count": 2,
        "fewstep.batch": "b7",
    }  # fmt: skip
    assert [dict(link.attributes or {}) for link in named["process batch"].links] == [
        {"messaging.message.id": "a" * 32}
    ]
    assert attributes(named["process job"]) == {**send, "messaging.operation.type": "process"}
    assert {named[name].kind for name in ("process batch", "process job")} == {SpanKind.CONSUMER}
    began, drawn = named["process job"].start_time, named["draw"].start_time
    assert began is not None and drawn is not None and began <= drawn, "its share is as long as the batch"


@pytest.mark.parametrize("role", ["api", "worker"])
def test_spans_say_which_process_they_are_of(role: Role) -> None:
    tracing = open_tracing(Settings(tracing=True), role)
    assert isinstance(tracing, OpenTelemetry)
    assert tracing._provider.resource.attributes["service.name"] == f"fewstep-{role}"
    tracing.close()
