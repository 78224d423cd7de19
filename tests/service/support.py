"""What the service's tests share: deadlines instead of sleeps, processes, and a queue without an API around it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
import redis
from PIL import Image

from service.listener import listen
from service.queue.connection import connect, connect_async
from service.queue.consumer import Consumer
from service.queue.job import Job, QueueOptions, Record, Verdict, lane
from service.queue.producer import Producer
from service.queue.result import RESULT_VERSION
from service.queue.scripts import prefix
from student.runtimes.fake import fake_image

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str = "", patience_s: float = PATIENCE_S) -> T:
    """The first true answer of ``look``; fails after a deadline that only a broken program reaches."""
    deadline = time.monotonic() + patience_s
    while not (answer := look()):
        assert time.monotonic() < deadline, f"never happened: {what or look}"
        time.sleep(0.01)
    return answer


def alive(pid: int) -> bool:
    """Whether a process runs. (One that has ended but was not collected by its parent does not.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This environment with these settings and no others; one worker, of which most tests have something to say."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "FEWSTEP_WORKERS": "1",
        **{f"FEWSTEP_{name}": value for name, value in settings.items()},
    }


def a_job(**changes: Any) -> Job:
    """A job of the fake student."""
    job = Job(
        id=uuid.uuid4().hex, key="anonymous", model="fake", version="1", height=64, width=64, steps=4,
        prompt="a red heart", seeds=(7,), output_format="png", quality=None, response_format="b64_json", previews=0,
        priority=0, user=None, metadata={}, request_id="r",
    )  # fmt: skip
    return replace(job, **changes)


class Queue:
    """One model's queue on a real server, driven from both sides."""

    def __init__(self, url: str, runner: asyncio.Runner, **limits: Any) -> None:
        self.url = url
        self.model = f"m{uuid.uuid4().hex}"
        self.lane = lane(self.model, "1")
        self.prefix = prefix(self.model)
        self.client: redis.Redis = connect(url)
        self._others: list[redis.Redis] = []
        self.runner = runner
        self.timeout_s = limits.pop("timeout_s", 60.0)
        self.limits = {"ttl_s": 60.0, "max_pending": 1000, "max_attempts": 3, **limits}
        self.async_client = connect_async(url)
        self.producer = Producer(self.async_client, self.model, "api", **self.limits)

    async def close(self) -> None:
        await self.async_client.aclose()
        for client in (self.client, *self._others):
            client.close()

    def another_client(self) -> redis.Redis:
        """With connections of its own; closed together with the queue."""
        self._others.append(connect(self.url))
        return self._others[-1]

    def consumer(self, name: str, lease_s: float = 60.0) -> Consumer:
        limits = {"lease_s": lease_s, "max_attempts": self.limits["max_attempts"]}
        return Consumer(self.client, self.model, name, **limits)

    def job(self, **changes: Any) -> Job:
        return a_job(model=self.model, **changes)

    def ask(self, job: Job, **options: Any) -> Verdict:
        return self.runner.run(self.producer.enqueue(job, QueueOptions(**{"timeout_s": self.timeout_s, **options})))

    def enqueue(self, job: Job, **options: Any) -> str:
        return self.ask(job, **options).word

    def add(self, **changes: Any) -> str:
        job = self.job(**changes)
        assert self.enqueue(job) == "ok"
        return job.id

    def cancel(self, id: str, why: Literal["cancelled", "expired"] = "cancelled") -> str:
        return self.runner.run(self.producer.cancel(id, why))

    def leave(self, id: str, client: str, grace_s: float = 0.0) -> str:
        return self.runner.run(self.producer.leave(id, client, grace_s))

    def record(self, id: str) -> Record:
        return self.runner.run(self.producer.records([id]))[id]

    def draw(self, count: int = 1) -> list[str]:
        """A worker draws so many jobs, one after the other; returns their ids in that order."""
        worker, drawn = self.consumer("w"), []
        for _ in range(count):
            for claimed in worker.claim({self.lane: 1}):
                worker.finish(claimed.id, claimed.token, "done", {"images": [], "runtime": "fake"})
                drawn.append(claimed.id)
        return drawn

    def reap(self) -> int:
        return self.runner.run(self.producer.reap())

    def state(self, id: str) -> str:
        return str(self.client.hget(f"{self.prefix}j:{id}", "state"))

    def result(self, id: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(str(self.client.hget(f"{self.prefix}j:{id}", "result")))
        assert said.pop("version") == RESULT_VERSION
        return said

    def field(self, id: str, name: str) -> str | None:
        return self.client.hget(f"{self.prefix}j:{id}", name)  # type: ignore[return-value]

    def notices(self) -> list[str]:
        """The ids whose end was announced to the API, in order, with repetitions."""
        return self.notices_of("end")

    def notices_of(self, what: str) -> list[str]:
        """The ids of which the API was told this, in order, with repetitions."""
        return [fields["id"] for _, fields in self.client.xrange(f"{self.prefix}r:api") if fields["what"] == what]

    def let_deadlines_pass(self, set: str = "d") -> None:
        """As if every deadline (or, of set "ab", every time of grace) had passed."""
        for id in self.client.zrange(f"{self.prefix}{set}", 0, -1):
            self.client.zadd(f"{self.prefix}{set}", {id: 1})

    def let_leases_end(self) -> None:
        """As if every lease had run out: time is the server's, so the test moves the leases, not the clock."""
        for id in self.client.zrange(f"{self.prefix}l", 0, -1):
            self.client.zadd(f"{self.prefix}l", {id: 1})

    def leftovers(self) -> set[str]:
        """Keys other than job records, notices and counters: a queue at rest has none."""
        keys = {key.removeprefix(self.prefix) for key in self.client.scan_iter(f"{self.prefix}*", count=1000)}
        return {key for key in keys if key.split(":")[0] in ("p", "b", "o", "pending", "l", "d", "sc", "ab", "a")}


class Service:
    """``python -m service.run`` with the fake runtime."""

    def __init__(self, data_dir: Path, settings: Mapping[str, str], arguments: tuple[str, ...] = ()) -> None:
        self.data_dir = data_dir
        self.output = data_dir.parent / f"{data_dir.name}.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.run", *arguments],
                cwd=REPOSITORY,
                env=clean_environment({"RUNTIME": "fake", "PORT": "0", "DATA_DIR": str(data_dir), **settings}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        def printed() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return "open http://" in self.output.read_text()

        eventually(printed, "ready", patience_s=60)

    def run_file(self) -> dict[str, Any]:
        return json.loads((self.data_dir / "run.json").read_text())  # type: ignore[no-any-return]

    @property
    def url(self) -> str:
        return str(self.run_file()["url"])

    def pids(self) -> dict[str, int]:
        return {process["role"]: process["pid"] for process in self.run_file()["processes"]}

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.data_dir / "redis" / "redis.sock"), decode_responses=True)

    def kill(self, role: str) -> int:
        pid = self.pids()[role]
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running_service(data_dir: Path, **settings: str) -> Iterator[Service]:
    """A service that is ready; afterwards it has stopped and nothing of it is left."""
    service = Service(data_dir, settings)
    try:
        service.wait_until_ready()
        pids = service.pids().values()
        yield service
    finally:
        try:
            service.stop()
        finally:
            service.process.kill()
            service.process.wait()
    assert not [pid for pid in pids if alive(pid)]


def wait_for_models(live: Service, models: Path) -> None:
    """A service of several students is ready with the first; this waits for all in the directory ``models``."""
    wanted = {folder.name for folder in models.iterdir()}
    listed = f"{live.url}/v1/models"
    eventually(lambda: {one["id"] for one in call("GET", listed).json()["data"]} >= wanted, "every model is served")


class Api:
    """``python -m service.run api`` alone, on a server of the test's choice: nobody draws."""

    def __init__(self, redis_url: str, folder: Path, **settings: str) -> None:
        with listen("127.0.0.1", 0) as listener:
            self.address: tuple[str, int] = listener.getsockname()
            values = {"RUNTIME": "fake", "REDIS_URL": redis_url, "DATA_DIR": str(folder), **settings}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.run", "api", "--listener", str(listener.fileno())],
                cwd=REPOSITORY,
                env=clean_environment(values),
                pass_fds=[listener.fileno()],
            )
        self.url = "http://{}:{}".format(*self.address)
        self.redis_url = redis_url
        self.redis: redis.Redis = connect(redis_url)
        self.prefix = prefix("fake")

    def waiting(self) -> int:
        return int(self.redis.zcard(f"{self.prefix}pending"))

    def hash_of(self, id: str) -> dict[str, str]:
        return self.redis.hgetall(f"{self.prefix}j:{id}")  # type: ignore[return-value]

    def ids(self) -> list[str]:
        return [str(key).rpartition(":")[2] for key in self.redis.scan_iter(f"{self.prefix}j:*")]

    def states(self) -> list[str]:
        """The states of all jobs."""
        return [str(self.redis.hget(key, "state")) for key in self.redis.scan_iter(f"{self.prefix}j:*")]

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.redis.close()


def start_worker(redis_url: str, folder: Path, **settings: str) -> subprocess.Popen[bytes]:
    """``python -m service.run worker`` alone."""
    values = {"RUNTIME": "fake", "REDIS_URL": redis_url, "DATA_DIR": str(folder), **settings}
    command = [sys.executable, "-m", "service.run", "worker"]
    return subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(values))


def post(url: str, **fields: Any) -> httpx.Response:
    """POST /generate."""
    return httpx.post(f"{url}/generate", json=fields, timeout=PATIENCE_S, trust_env=False)


def call(method: str, url: str, **options: Any) -> httpx.Response:
    """Any request, with the patience that a busy machine needs."""
    return httpx.request(method, url, timeout=PATIENCE_S, trust_env=False, **options)


def open_post(url: str, headers: Mapping[str, str] | None = None, **fields: Any) -> socket.socket:
    """POST /generate on a connection that the test can break."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps(fields).encode()
    lines = {"Host": f"{host}:{port}", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"POST /generate HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture's pixels, HWC."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def expected_pixels(prompt: str, seed: int, steps: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The answer key of the fake runtime."""
    return np.rint(fake_image(prompt, seed, steps) * 255).astype(np.uint8).transpose(1, 2, 0)


def check_answer(answer: dict[str, Any], prompt: str, seeds: list[int]) -> None:
    """Every picture of an answer is the one that was asked for."""
    assert [image["seed"] for image in answer["data"]] == seeds
    for image, seed in zip(answer["data"], seeds, strict=True):
        data = base64.b64decode(image["b64_json"])
        assert hashlib.sha256(data).hexdigest() == image["sha256"]
        assert np.array_equal(pixels(data), expected_pixels(prompt, seed)), (prompt, seed)
