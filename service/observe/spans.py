"""Tracing with OpenTelemetry; imported only where it is enabled. OTEL_* variables set where the spans go."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.observe.tracer import BatchTrace, Role, Tracing
from service.queue.job import Job

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
SYSTEM = "fewstep"


def exporting(role: Role) -> OpenTelemetry:
    """Tracing that exports over OTLP/HTTP.

    Raises:
        ImportError: the exporter is not installed.
    """
    exporter = importlib.import_module(EXPORTER).OTLPSpanExporter()
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: f"fewstep-{role}"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetry(provider)


class OpenTelemetry(Tracing):
    """Spans of one provider; no global one is set."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fewstep")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[str]:
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = self._propagator.extract(carrier, Context())
        with self._tracer.start_as_current_span(method, parent, SpanKind.SERVER) as span:
            yield trace.format_trace_id(span.get_span_context().trace_id)

    def answered(self, route: str, method: str, status: int) -> None:
        span = trace.get_current_span()
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))

    @contextmanager
    def publish(self, job: Job) -> Iterator[str]:
        attributes = {**_messaging("send"), "messaging.message.id": job.id}
        with self._tracer.start_as_current_span("send job", kind=SpanKind.PRODUCER, attributes=attributes):
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield carrier.get("traceparent", "")

    def batch(self, batch: str, jobs: Sequence[Job]) -> BatchTrace:
        senders = [(job, context) for job in jobs if (context := self._sender(job)) is not None]
        attributes = {**_messaging("process"), "messaging.batch.message_count": len(jobs), "fewstep.batch": batch}
        links = [Link(sender, {"messaging.message.id": job.id}) for job, sender in senders]
        span = self._tracer.start_span("process batch", Context(), SpanKind.CONSUMER, attributes, links)
        return BatchSpan(self._tracer, span, senders)

    def close(self) -> None:
        self._provider.shutdown()

    def _sender(self, job: Job) -> SpanContext | None:
        context = self._propagator.extract({"traceparent": job.traceparent}, Context())
        found = trace.get_current_span(context).get_span_context()
        return found if found.is_valid else None


class BatchSpan(BatchTrace):
    """The span of a batch, and at its end one for its share in the trace of each of its jobs."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, senders: Sequence[tuple[Job, SpanContext]]) -> None:
        self._tracer = tracer
        self._span = span
        self._senders = senders
        self._started_ns = time.time_ns()

    def begin(self, stage: str) -> Callable[[], object]:
        return self._tracer.start_span(stage, trace.set_span_in_context(self._span, Context())).end

    def end(self) -> None:
        self._span.end()
        for job, sender in self._senders:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(sender), Context())
            attributes = {**_messaging("process"), "messaging.message.id": job.id}
            links = [Link(self._span.get_span_context())]
            share = self._tracer.start_span(
                "process job", parent, SpanKind.CONSUMER, attributes, links, self._started_ns
            )
            share.end()


def _messaging(operation: str) -> dict[str, str | int]:
    return {"messaging.system": SYSTEM, "messaging.operation.type": operation}
