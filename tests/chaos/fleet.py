"""A service in separate processes, as on several machines: nobody but leases and deadlines watches over them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import redis

from service.listener import listen
from service.queue.connection import connect
from service.queue.scripts import prefix
from service.supervise.redis_server import EmbeddedServer, find_program
from tests.chaos.proxy import Proxy
from tests.service.support import PATIENCE_S, REPOSITORY, call, clean_environment, eventually

LEASE_S = 2.0
MAX_ATTEMPTS = 4
POLL_EVERY_S = 0.05
UNLIMITED = resource.RLIM_INFINITY
# A release that says more in its jobs and results, and reads less than it is told by the present one.
LATER = """
import json, service.queue.job as job, service.queue.result as result
to_payload, write_result = job.Job.to_payload, result.write_result
def more(self): return json.dumps({**json.loads(to_payload(self)), "mood": "calm", "metadata": {}})
def reduced(said):
    images = [{**image, "rank": 1} for image in said.get("images", [])]
    return json.dumps({**json.loads(write_result(said)), "version": 2, "mood": "calm", "images": images})
job.Job.to_payload, result.write_result = more, reduced
"""
# Another release, or a machine whose clock is wrong: the same program after a change of one name.
PREAMBLES = {
    "": "",
    "next release": "import service.queue.job as job; job.SCHEMA_VERSION += 1;",
    "a later release": f"exec({LATER!r});",
    "an hour ahead": "import time; real = time.time; time.time = lambda: real() + 3600;",
    "an hour behind": "import time; real = time.time; time.time = lambda: real() - 3600;",
}


class Member:
    """One process of the fleet; ``wanted``: it is started again when it dies."""

    def __init__(self, role: str, port: int, settings: dict[str, str], preamble: str, log: Path) -> None:
        self.role = role
        self.settings = settings
        self.wanted = True
        self.log = log
        self._preamble = PREAMBLES[preamble]
        self._listener = listen("127.0.0.1", port) if role == "api" else None
        self.url = "http://{}:{}".format(*self._listener.getsockname()) if self._listener else ""
        self.start()

    def start(self) -> None:
        more = ["--listener", str(self._listener.fileno())] if self._listener else []
        code = f"import sys; {self._preamble} from service.run import app; app(sys.argv[1:])"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, self.role, *more],
                cwd=REPOSITORY,
                env=clean_environment(self.settings),
                pass_fds=[self._listener.fileno()] if self._listener else [],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.wanted = False
        self.process.kill()
        self.process.wait()
        if self._listener:
            self._listener.close()


class Fleet:
    """A queue's server, HTTP processes and workers, joined by two proxies, one on each side of the queue."""

    def __init__(self, folder: Path, apis: int = 2, workers: int = 2, **settings: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._program = _ignoring_full_disks(folder)
        self.server = self.new_server("redis")
        self.api_side, self.worker_side = Proxy(self.server.socket), Proxy(self.server.socket)
        self.prefix = prefix("fake")
        self.members: list[Member] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._nurse = threading.Thread(target=self._look_after, daemon=True)
        self._settings = settings
        self.apis = [self.add("api") for _ in range(apis)]
        self.workers = [self.add("worker") for _ in range(workers)]
        self._nurse.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def new_server(self, name: str) -> EmbeddedServer:
        server = EmbeddedServer(self.folder / name, program=self._program)
        server.start()
        return server

    @property
    def redis(self) -> redis.Redis:
        return connect(self.server.url)

    @property
    def results(self) -> Path:
        return self.folder / "data" / "results"

    def add(self, role: str, preamble: str = "", **settings: str) -> Member:
        proxy = self.api_side if role == "api" else self.worker_side
        values = {
            "RUNTIME": "fake", "REDIS_URL": proxy.url, "DATA_DIR": str(self.folder / "data"), "LEASE_S": str(LEASE_S),
            "MAX_ATTEMPTS": str(MAX_ATTEMPTS), "LOG_FORMAT": "json", **self._settings, **settings,
        }  # fmt: skip
        with self._lock:
            member = Member(role, 0, values, preamble, self.folder / f"{role}-{len(self.members)}.log")
            self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        with self._lock:
            self.members.remove(member)
        member.end()

    def wait_until_ready(self) -> None:
        """Every HTTP process answers, and every worker has given a sign of life."""
        workers = sum(member.role == "worker" for member in self.members)
        for member in [member for member in self.members if member.role == "api"]:
            eventually(lambda url=member.url: _workers(url) >= workers, f"ready: {member.url}", patience_s=120)  # type: ignore[misc]

    def restart_server(self, empty: bool = False) -> None:
        """Start the killed server again, with or without its data."""
        if empty:
            for path in (self.server._folder / "appendonlydir").iterdir():
                path.unlink()
        self.server.start()

    def kill_server(self) -> None:
        assert self.server.process
        self.server.process.kill()
        self.server.process.wait()

    def move_to(self, server: EmbeddedServer) -> None:
        """From now on both proxies lead to another server."""
        self.server = server
        for proxy in (self.api_side, self.worker_side):
            proxy.target = server.socket
            proxy.cut()

    def limit_files(self, size_bytes: int) -> None:
        """No file of the queue's server may grow beyond that: its disk is full."""
        assert self.server.process
        resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE, (size_bytes, UNLIMITED))

    def held(self) -> int:
        return int(self.redis.zcard(f"{self.prefix}l"))

    def wait_until_busy(self, jobs: int = 1) -> None:
        eventually(lambda: self.held() >= jobs, "the workers hold jobs")

    def counter(self, name: str) -> int:
        return int(str(self.redis.hget(f"{self.prefix}n", name) or 0))

    def job(self, id: str) -> dict[str, str]:
        return self.redis.hgetall(f"{self.prefix}j:{id}")  # type: ignore[return-value]

    def at_rest(self) -> bool:
        """Nothing waits, runs, or is left over."""
        return not any(self.redis.exists(f"{self.prefix}{key}") for key in ("pending", "o", "l", "d", "sc", "ab", "b"))

    def close(self) -> None:
        self._end.set()
        self._nurse.join()
        for member in self.members:
            member.end()
        for proxy in (self.api_side, self.worker_side):
            proxy.close()
        self.server.stop()

    def _look_after(self) -> None:
        """What systemd or Kubernetes would do."""
        while not self._end.wait(POLL_EVERY_S):
            with self._lock:
                for member in self.members:
                    if member.wanted and member.process.poll() is not None:
                        member.start()


def _ignoring_full_disks(folder: Path) -> Path:
    """The server as a script that lets it survive a file that may not grow, as it does a disk that is full."""
    script = folder / "server"
    script.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec '{find_program()}' \"$@\"\n")
    script.chmod(0o755)
    return script


def _workers(url: str) -> int:
    try:
        answer = call("GET", f"{url}/readyz")
    except httpx.HTTPError:  # a machine with much else to do
        return 0
    return int(answer.json()["workers"]) if answer.status_code == 200 else 0


def stop_gently(member: Member) -> int:
    """SIGTERM; returns the exit code. It is not started again."""
    member.wanted = False
    os.kill(member.process.pid, signal.SIGTERM)
    return member.process.wait(PATIENCE_S)
