"""``serve``: everything that a service needs, in processes that live and end together."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redis.exceptions import RedisError

from service.errors import StartupError
from service.exposure import check_exposure
from service.keys import KeyStore
from service.listener import listen
from service.models.single import check_models, queue_name
from service.observe.accelerators import VISIBLE, visible_gpus
from service.observe.shared import fresh_folder
from service.queue.connection import check_server, connect
from service.queue.consumer import Consumer
from service.queue.status import DRAINED, WorkerState
from service.settings import PREFIX, REPOSITORY, SECRETS_DIR, Settings
from service.supervise.probe import live_workers
from service.supervise.processes import spawn, stop
from service.supervise.redis_server import EmbeddedServer
from service.supervise.workers_on_cpu import workers_on_cpu

READY_TIMEOUT_S = 120.0
POLL_EVERY_S = 0.1
ASK_TIMEOUT_S = 2.0
API_MARGIN_S, WORKER_MARGIN_S = 1.2, 0.6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
STEADY_AFTER_S = 5.0

log = logging.getLogger("fewstep")


@dataclass
class Child:
    """A process that is started again when it dies; a longer pause each time unless it ran steadily.

    ``gpu`` is what CUDA_VISIBLE_DEVICES shows it; empty: what it shows this process. ``part`` tells the HTTP processes
    apart.
    """

    role: str
    gpu: str = ""
    part: int = 0
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due: float = field(default=0.0)


class Supervisor:
    """Starts the embedded server (if no other is named), the HTTP process and the workers, and watches over them.

    The listening socket belongs to this process: a client that comes while the HTTP process is being replaced waits
    instead of being refused.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue = queue_name(settings)
        check_models(settings)
        self._listener = listen(settings.host, settings.port)
        check_exposure(settings, self._listener.getsockname()[0], KeyStore(settings.data_dir))
        self._lock = _claim_data_dir(settings.data_dir)
        self._server: EmbeddedServer | None = None
        workers = workers_of(settings.workers, visible_gpus(), workers_on_cpu(settings))
        self._children = [Child("api", part=part) for part in range(settings.apis)] + workers
        self._workers = len(workers)
        self._redis_url = settings.redis_url or ""
        self._stopping = False

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; nothing is left running, whatever happens.

        Raises:
            StartupError: a part did not come up.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._start()
            while not self._stopping:
                self._restart_server()
                for child in self._children:
                    self._restart(child)
                time.sleep(POLL_EVERY_S)
        finally:
            self._stop()

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    def _start(self) -> None:
        if self._settings.redis_url is None:
            self._server = EmbeddedServer(self._settings.data_dir / "redis")
            self._redis_url = self._server.url
            self._server.start()
        else:
            check_server(self._redis_url)
        fresh_folder(self._settings.data_dir)
        for child in self._children:
            self._spawn(child)
        about = self._wait_until_ready()
        if about:
            what = f"{about['model']} {about['model_version']} on {about['runtime']}"
            took = f"loaded in {about['load_s']:.1f} s, including {about['warm_up_s']:.1f} s of warm-up"
            print(f"fewstep serves {what} ({took}): open {self.url} (Ctrl-C stops it)", flush=True)

    def _spawn(self, child: Child) -> None:
        child.name = uuid.uuid4().hex
        command = [sys.executable, "-m", "service.run", child.role]
        if child.role == "worker":
            command += ["--name", child.name]
        else:
            command += ["--listener", str(self._listener.fileno())]
            command += ["--part", str(child.part)] if self._settings.apis > 1 else []
        child.started = time.monotonic()
        child.process = spawn(
            command,
            env=self._environment(child),
            pass_fds=[self._listener.fileno()] if child.role == "api" else [],
            folder=REPOSITORY,
        )
        self._write_run_file()

    def _environment(self, child: Child) -> dict[str, str]:
        settings = self._settings  # its paths are absolute; the children run in another directory
        what = {"MODELS": str(settings.models)} if settings.models else {"MODEL": str(settings.model)}
        chosen = {"REDIS_URL": self._redis_url, "DATA_DIR": str(settings.data_dir), **what}
        chosen["WORKERS"] = str(self._workers)
        chosen["INSECURE"] = str(settings.insecure).lower()
        paths = {"C2PA_CERT": settings.c2pa_cert, "C2PA_KEY": settings.c2pa_key}
        chosen |= {name: str(path) for name, path in paths.items() if path is not None}
        if folder := os.environ.get(SECRETS_DIR):
            chosen["SECRETS_DIR"] = str(Path(folder).expanduser().absolute())
        gpu = {VISIBLE: child.gpu} if child.gpu else {}
        return {**os.environ, **{PREFIX + name: value for name, value in chosen.items()}, **gpu}

    def _wait_until_ready(self) -> dict[str, Any]:
        """The answer of /readyz once it is ready; empty if a signal to stop arrives first.

        A large student takes its time: as long as a worker says that it loads, it is waited for.

        Raises:
            StartupError: a process has ended, or none that loads has been heard of for a while.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._stopping:
            for child in self._children:
                if child.process and (code := child.process.poll()) is not None:
                    raise StartupError(f"The {child.role} process ended with code {code} instead of becoming ready.")
            if about := _ask(f"{self.url}/readyz"):
                return about
            if time.monotonic() > deadline:
                self._check_loading()
                print("fewstep: the workers are still loading (Ctrl-C stops it)", file=sys.stderr, flush=True)
                deadline = time.monotonic() + READY_TIMEOUT_S
            time.sleep(POLL_EVERY_S)
        return {}

    def _check_loading(self) -> None:
        """Return if there is something to wait for: a worker that says that it loads.

        Raises:
            StartupError: there is none.
        """
        after = f"after {READY_TIMEOUT_S:.0f} s"
        if not _ask(f"{self.url}/healthz"):
            raise StartupError(f"The HTTP process does not answer {after}.")
        try:
            workers = live_workers(self._settings.model_copy(update={"redis_url": self._redis_url}))
        except RedisError as error:
            raise StartupError(f"The queue cannot be reached {after}: {error}.") from error
        states = ", ".join(worker.state for worker in workers)
        if WorkerState.LOADING not in [worker.state for worker in workers]:
            said = f"the workers say {states}" if workers else "no worker has given a sign of life"
            raise StartupError(f"The service is not ready {after}, and nothing loads: {said}.")

    def _restart_server(self) -> None:
        if self._server and self._server.process and (code := self._server.process.poll()) is not None:
            log.warning("the embedded server ended with code %s; it is restarted", code)
            self._server.process = None
            self._write_run_file()
            self._server.start()
            self._write_run_file()

    def _restart(self, child: Child) -> None:
        now = time.monotonic()
        if child.process and (code := child.process.poll()) is not None:
            drained = child.role == "worker" and code == DRAINED
            then = "an operator has drained it" if drained else "it is started again"
            log.warning("the %s process %d ended with code %s; %s", child.role, child.process.pid, code, then)
            child.process = None
            self._write_run_file()
            if drained:
                child.due = math.inf
                return
            child.pause_s = FIRST_PAUSE_S if now - child.started > STEADY_AFTER_S else child.pause_s
            child.due, child.pause_s = now + child.pause_s, min(2 * child.pause_s, LONGEST_PAUSE_S)
            if child.role == "worker":
                self._take_back(child.name)
        if child.process is None and now >= child.due:
            self._spawn(child)

    def _take_back(self, worker: str) -> None:
        """Release a dead worker's jobs at once; if that fails, its leases run out by themselves."""
        settings = self._settings
        client = connect(self._redis_url, retries=0)
        consumer = Consumer(client, self._queue, "", lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        try:
            consumer.lost(worker)
        except RedisError as error:
            log.warning("the jobs of a dead worker wait for the end of their lease: %s", error)
        finally:
            client.close()

    def _write_run_file(self) -> None:
        running = [("supervisor", os.getpid())]
        if self._server and self._server.process:
            running.append(("redis", self._server.process.pid))
        running += [(child.role, child.process.pid) for child in self._children if child.process]
        processes = [{"role": role, "pid": pid} for role, pid in running]
        path = self._settings.data_dir / "run.json"
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"url": self.url, "processes": processes}, indent=2) + "\n", "utf-8")
        unfinished.replace(path)

    def _stop(self) -> None:
        """The HTTP process first (its clients still get their answers), then the workers, then the server."""
        self._listener.close()
        settings = self._settings
        api_s = settings.drain_s + math.ceil(settings.grace_s) + API_MARGIN_S
        for role, grace_s in (("api", api_s), ("worker", settings.grace_s + WORKER_MARGIN_S)):
            stop([child.process for child in self._children if child.process and child.role == role], grace_s)
        if self._server:
            self._server.stop()
        (self._settings.data_dir / "run.json").unlink(missing_ok=True)
        os.close(self._lock)


def workers_of(wanted: int | Literal["auto"], gpus: Sequence[str], on_cpu: int) -> list[Child]:
    """So many, each on one of the GPUs in turn; ``auto``: one on each GPU, or ``on_cpu`` of them without any."""
    count = (len(gpus) or on_cpu) if wanted == "auto" else wanted
    return [Child("worker", gpu=gpus[number % len(gpus)] if gpus else "") for number in range(count)]


def _claim_data_dir(folder: Path) -> int:
    """Lock the data directory for as long as this process lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartupError(f"FEWSTEP_DATA_DIR {folder} cannot be used: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartupError(f"Another service already uses {folder}: FEWSTEP_DATA_DIR sets another one.") from None
    return descriptor


def _ask(url: str) -> dict[str, Any]:
    """The JSON behind a URL, or nothing if it cannot be had (yet)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=ASK_TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except (urllib.error.URLError, TimeoutError, OSError, ValueError):
        return {}
