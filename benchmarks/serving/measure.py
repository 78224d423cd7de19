"""One server, started, checked, loaded and stopped: its figures in one round."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import uvloop

from benchmarks.serving.contenders import Contender, Form
from benchmarks.serving.engine import PROMPT, REPOSITORY
from fewstep.errors import FewstepError, TooLate, Unreachable
from fewstep.load.drive import Outcome, Sample, Send, closed_loop, open_loop
from fewstep.load.report import latency
from fewstep.load.workload import Arrival, Request, poisson

START_S, STOP_S = 120.0, 20.0
USERS = (1, 8, 32)
SHARE, OVERLOAD = 0.7, 2.0  # of the throughput at the most users
PATIENCE_S = 2.0  # after which a client of an overloaded server leaves
DEADLINE_S = 1.5
SETTLE_S = 3.0  # of an overload, before it counts
SAMPLES = ((PROMPT, 7), (PROMPT, 8), ("a large yellow star on a navy background", 7))
Figures = dict[str, float]


class Unequal(Exception):
    """A server's answers are not the engine's."""


@dataclass(frozen=True)
class Running:
    """A started server."""

    contender: Contender
    process: subprocess.Popen[bytes]
    url: str
    first_s: float

    def cpu_s(self) -> float:
        """Processor time of all its processes until now."""
        return sum(_cpu_s(process) for process in self._all())

    def rss_mib(self) -> float:
        """Memory of all its processes."""
        return sum(_rss(process) for process in self._all()) / 2**20

    def _all(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []


def _cpu_s(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _rss(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_info().rss)
    return 0.0


@contextmanager
def running(contender: Contender, python: Path, form: Form, deadline_s: float = 0.0) -> Iterator[Running]:
    """A server that has answered once.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fewstep-serving-", ignore_cleanup_errors=True) as folder:
        with open(Path(folder) / "log", "w+b") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                contender.command(python, form, port, deadline_s), cwd=REPOSITORY, stdout=log, stderr=log,
                env=contender.environment(python, port, Path(folder) / "data"), start_new_session=True,
            )  # fmt: skip
            try:
                url = f"http://127.0.0.1:{port}"
                _wait(contender, process, url, Path(log.name))
                yield Running(contender, process, url, time.perf_counter() - started)
            finally:
                _stop(process)


def _wait(contender: Contender, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if _post(contender, url, PROMPT, 0).is_success:
                return
        time.sleep(0.1)
    last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    raise RuntimeError(f"{contender.name} does not start: {' '.join(last)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        for child in (one for one in family if one.is_running()):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _post(contender: Contender, url: str, prompt: str, seed: int) -> httpx.Response:
    body = contender.body(prompt, seed, 0.0)
    return httpx.post(f"{url}/generate", json=body, timeout=30.0, trust_env=False)


def check(server: Running, expected: Mapping[tuple[str, int], str]) -> None:
    """Its pictures are the engine's, byte by byte.

    Raises:
        Unequal: they are not.
    """
    for (prompt, seed), sha256 in expected.items():
        data = server.contender.picture(_post(server.contender, server.url, prompt, seed).json())
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Unequal(f"{server.contender.name} draws seed {seed} of {prompt!r} otherwise than the engine")


def load(server: Running, drive: Callable[[Send], Any], *, deadline_s: float = 0.0, patience_s: float = 60.0) -> Any:
    """Run a load whose clients leave after ``patience_s``."""

    async def run() -> Any:
        # A client costs these cores, too, and httpx costs three times as much: too much for twice the saturation.
        limits = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(60.0)) as http:

            async def send(request: Request) -> Outcome:
                body = server.contender.body(request["prompt"], request["seed"], deadline_s)
                try:
                    async with (
                        asyncio.timeout(patience_s),
                        http.post(f"{server.url}/generate", json=body) as response,
                    ):
                        answer = await response.read()
                except TimeoutError:
                    raise TooLate("The client has left.") from None
                except aiohttp.ClientError as failure:
                    raise Unreachable(str(failure)) from failure
                if response.status >= 400:
                    raise FewstepError(f"status {response.status}")
                if not server.contender.answer(json.loads(answer))["data"]:
                    raise FewstepError("There is no picture in the answer.")
                return Outcome(1)

            return await drive(send)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def requests(seed: int) -> Iterator[Request]:
    """Endlessly many, no two alike."""
    while True:
        yield {"prompt": PROMPT, "seed": seed}
        seed += 1


def closed(server: Running, users: int, seconds: float) -> Figures:
    """Throughput, latency and processor time with ``users`` users."""
    before_s = server.cpu_s()
    samples = load(server, lambda send: closed_loop(send, requests(1), users, seconds=seconds))
    spent_s = server.cpu_s() - before_s
    good = [sample for sample in samples if sample.outcome.error is None]
    figures = latency([sample.latency_s for sample in good]) if good else None
    return {
        "per_s": sum(sample.done_s <= seconds for sample in good) / seconds,
        "p50_s": figures.p50_s if figures else float("nan"),
        "p99_s": figures.p99_s if figures else float("nan"),
        "cpu_s": spent_s / max(1, len(good)),
        "errors": float(len(samples) - len(good)),
    }


def open_(server: Running, rate: float, seconds: float, seed: int) -> Figures:
    """Latency under random arrivals at ``rate`` a second."""
    arrivals = poisson(requests(1), rate, seconds, seed)
    samples = load(server, lambda send: open_loop(send, arrivals))
    good = [sample.latency_s for sample in samples if sample.outcome.error is None]
    figures = latency(good) if good else None
    return {
        "p50_s": figures.p50_s if figures else float("nan"),
        "p99_s": figures.p99_s if figures else float("nan"),
        "errors": float(len(samples) - len(good)),
    }


def overload(server: Running, rate: float, seconds: float, seed: int, deadline_s: float) -> Figures:
    """Answers in time a second, of requests that were due after the first moments of an overload. In time is within
    the deadline, or while the client is still there."""
    arrivals: list[Arrival] = poisson(requests(1), rate, SETTLE_S + seconds, seed)
    samples: list[Sample] = load(
        server, lambda send: open_loop(send, arrivals), deadline_s=deadline_s, patience_s=PATIENCE_S
    )
    objective_s = deadline_s or PATIENCE_S
    good = [
        sample for sample in samples
        if sample.outcome.error is None and sample.due_s >= SETTLE_S and sample.latency_s <= objective_s
    ]  # fmt: skip
    return {"goodput_per_s": len(good) / seconds}


def measure(
    contender: Contender, python: Path, form: Form, expected: Mapping[tuple[str, int], str], seconds: float, seed: int
) -> dict[str, Figures]:
    """All points of one server in one round."""
    with running(contender, python, form) as server:
        check(server, expected)
        closed(server, 8, min(2.0, seconds))
        found = {"start": {"first_s": server.first_s}}
        found |= {f"closed {users}": closed(server, users, seconds) for users in USERS}
        most = max(1.0, found[f"closed {USERS[-1]}"]["per_s"])
        found["start"]["rss_mib"] = server.rss_mib()
        found["open"] = open_(server, SHARE * most, seconds, seed)
        found["overload"] = overload(server, OVERLOAD * most, seconds, seed, 0.0)
    with running(contender, python, form, DEADLINE_S) as server:
        closed(server, 8, min(2.0, seconds))
        found["overload, deadline"] = overload(server, OVERLOAD * most, seconds, seed, DEADLINE_S)
    return found


def try_out(contender: Contender, python: Path, form: Form, seconds: float) -> float:
    """Throughput of a form at the most users."""
    with running(contender, python, form) as server:
        closed(server, 8, min(2.0, seconds))
        return closed(server, USERS[-1], seconds)["per_s"]
