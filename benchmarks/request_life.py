"""Where the time of one request goes, by the service's own spans: ``python -m benchmarks.request_life``.

A service without settings is started with tracing; one user, or several, ask it for one picture at a time; a collector
in this process receives the spans of the HTTP process and of the workers. --write puts the table into
docs/performance.md. The clocks of both processes are the machine's, so that moments of different spans compare.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.serving.contenders import CONTENDERS, Contender, Form
from benchmarks.serving.engine import REPOSITORY
from benchmarks.serving.measure import load, requests, running
from benchmarks.serving.report import write_between
from fewstep.load.drive import closed_loop

DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- life: begin -->", "<!-- life: end -->"
USERS = (1, 8)
WARM_S = 2.0
STAGES = {
    "checked": "the HTTP process reads the request, checks key, limits and prompt, and writes down the seed",
    "queued": "one script puts the job into its queue",
    "waiting": "until a worker has claimed it and its device is free",
    "drawn": "prompt, noise and all steps of the student",
    "scored": "waits for the scorers' thread and for the scorers",
    "settled": "what is left of PNG and file, which are written while it is scored, and the script that ends the job",
    "answered": "the HTTP process hears of it, reads record and file, and writes JSON",
    "in all": "from the first byte that the HTTP process saw to its last",
}


@dataclass(frozen=True)
class Span:
    """A span as the collector got it; times in nanoseconds."""

    trace: bytes
    id: bytes
    parent: bytes
    links: tuple[bytes, ...]
    name: str
    began_ns: int
    ended_ns: int

    @classmethod
    def of(cls, sent: Any) -> Span:
        """A span as OTLP sends it."""
        links = tuple(link.span_id for link in sent.links)
        times = (sent.start_time_unix_nano, sent.end_time_unix_nano)
        return cls(sent.trace_id, sent.span_id, sent.parent_span_id, links, sent.name, *times)


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """An OTLP endpoint on this machine, and the spans that it has been sent."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            received = [span for each in sent.resource_spans for scope in each.scope_spans for span in scope.spans]
            spans.extend(Span.of(span) for span in received)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def lives(spans: Sequence[Span], since_ns: int = 0) -> list[dict[str, float]]:
    """Of each request that came since then and whose spans are complete: microseconds by stage."""
    by_trace: dict[bytes, dict[str, Span]] = {}
    for span in spans:
        by_trace.setdefault(span.trace, {})[span.name] = span
    stages = {(span.parent, span.name): span for span in spans if span.name in ("draw", "score", "settle")}
    found = []
    for trace in by_trace.values():
        try:
            http, sent, job = trace["POST /generate"], trace["send job"], trace["process job"]
            draw, score, settle = (stages[job.links[0], name] for name in ("draw", "score", "settle"))
        except KeyError:
            continue
        if http.began_ns < since_ns:
            continue
        queued_ns = min(sent.ended_ns, draw.began_ns)  # an idle worker claims before the script's answer is read
        moments = (
            http.began_ns, sent.began_ns, queued_ns, draw.began_ns, draw.ended_ns, score.ended_ns, settle.ended_ns,
            http.ended_ns,
        )  # fmt: skip
        times = [(after - before) / 1e3 for before, after in zip(moments, moments[1:], strict=False)]
        found.append(dict(zip(STAGES, [*times, (moments[-1] - moments[0]) / 1e3], strict=True)))
    return found


@dataclass(frozen=True)
class Traced(Contender):
    """The service, whose spans go to ``collector``."""

    collector: str = ""

    def environment(self, python: Path, port: int, data: Path) -> dict[str, str]:
        spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": self.collector, "OTEL_BSP_SCHEDULE_DELAY": "500"}
        return {**super().environment(python, port, data), "FEWSTEP_TRACING": "true", **spans}


def measure(users: int, seconds: float) -> list[dict[str, float]]:
    """The lives of the requests of a closed loop of so many users, the first moments left out."""
    [ours] = [one for one in CONTENDERS if one.name == "fewstep"]
    with collector() as (url, spans):
        traced = Traced(ours.name, ours.module, body=ours.body, collector=url)
        with running(traced, Path(sys.executable), Form(0, 0)) as server:
            began_ns = time.time_ns() + round(WARM_S * 1e9)
            load(server, lambda send: closed_loop(send, requests(1), users, seconds=WARM_S + seconds))
        return lives(spans, began_ns)


def table(found: dict[int, list[dict[str, float]]]) -> str:
    """A row for each stage: the median of the requests of each number of users."""
    lines = [
        "| stage | " + " | ".join(f"{users} user{'s' * (users > 1)}, µs" for users in found) + " | |",
        "|--|" + "--:|" * len(found) + "--|",
    ]
    for stage, meaning in STAGES.items():
        cells = [f"{statistics.median(life[stage] for life in each):,.0f}" for each in found.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + f" | {meaning} |")
    counts = " and ".join(f"{len(each):,}" for each in found.values())
    return "\n".join(lines) + f"\n\nMedians of {counts} requests, so the rows do not add up exactly; tracing costs too."


def main(argv: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    name = "python -m benchmarks.request_life"
    parser = argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=form)
    parser.add_argument("--seconds", type=float, default=10.0, help="Of load, after the first moments.")
    parser.add_argument("--write", action="store_true", help="Write the table into docs/performance.md.")
    arguments = parser.parse_args(argv)
    shown = table({users: measure(users, arguments.seconds) for users in USERS})
    print(shown)
    if arguments.write:
        write_between(DOCUMENT, shown, BEGIN, END)


if __name__ == "__main__":
    main()
