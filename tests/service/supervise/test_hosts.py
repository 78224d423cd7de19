"""Three hosts, as network namespaces: the HTTP process with the queue, and two workers, of which one is cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from service.listener import listen
from service.queue.scripts import prefix
from service.supervise.redis_server import find_program
from tests.service.support import PATIENCE_S, REPOSITORY, check_answer, clean_environment, eventually, post

PORT = 6379
LEASE_S = 2
PREFIX = prefix("fake")
JOBS = 8
PROMPT = "fake:sleep=1 a red heart"


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    name = f"fewstep-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return False
    made = subprocess.run(["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return made.returncode == 0


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="only root can make network namespaces (with ip)")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass(frozen=True)
class Host:
    """A namespace; the hub's end of its cable has ``address``."""

    name: str
    address: str = "127.0.0.1"

    def start(
        self, *command: str, settings: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen[bytes]:
        environment = clean_environment({"RUNTIME": "fake", "LEASE_S": str(LEASE_S), **(settings or {})})
        arguments = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, **options)  # type: ignore[call-overload, no-any-return]

    def link(self, state: str) -> None:
        """Plug the cable in ('up') or out ('down')."""
        ip("-n", self.name, "link", "set", "hub", state)


@contextmanager
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    """A hub and two hosts, each on a cable of its own to the hub."""
    hub, *others = names = [f"fewstep-{os.getpid()}-{part}" for part in ("hub", "a", "b")]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number, name in enumerate(others):
            far = f"w{number}"
            ip("-n", hub, "link", "add", far, "type", "veth", "peer", "name", "hub", "netns", name)
            ip("-n", hub, "address", "add", f"10.203.{number}.1/24", "dev", far)
            ip("-n", name, "address", "add", f"10.203.{number}.2/24", "dev", "hub")
            ip("-n", hub, "link", "set", far, "up")
            ip("-n", name, "link", "set", "hub", "up")
        yield Host(hub), Host(others[0], "10.203.0.1"), Host(others[1], "10.203.1.1")


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


def worker(host: Host, name: str, folder: Path) -> subprocess.Popen[bytes]:
    settings = {"REDIS_URL": f"redis://{host.address}:{PORT}", "DATA_DIR": str(folder / "data")}
    return host.start(sys.executable, "-m", "service.run", "worker", "--name", name, settings=settings)


def api(hub: Host, folder: Path, stack: ExitStack) -> str:
    """The HTTP process lives in the hub; its socket, made here, is where this process can reach it."""
    settings = {"REDIS_URL": f"redis://127.0.0.1:{PORT}", "DATA_DIR": str(folder / "data")}
    with listen("127.0.0.1", 0) as listener:
        command = [sys.executable, "-m", "service.run", "api", "--listener", str(listener.fileno())]
        stack.enter_context(ended(hub.start(*command, settings=settings, pass_fds=[listener.fileno()])))
        return "http://{}:{}".format(*listener.getsockname())


def server(hub: Host, folder: Path, stack: ExitStack) -> redis.Redis:
    """The queue, open to the cables; this process looks into it through a file."""
    socket = folder / "s"
    options = ["--port", str(PORT), "--bind", "0.0.0.0", "--protected-mode", "no", "--unixsocket", str(socket)]
    process = hub.start(find_program(), *options, "--save", "", "--dir", str(folder), stdout=subprocess.DEVNULL)
    stack.enter_context(ended(process))
    eventually(socket.exists, "the queue listens")
    return stack.enter_context(redis.Redis(unix_socket_path=str(socket), decode_responses=True))


def held_by(queue: redis.Redis, name: str) -> list[str]:
    ids = queue.zrange(f"{PREFIX}l", 0, -1)
    return [id for id in ids if queue.hget(f"{PREFIX}j:{id}", "worker") == name]


def test_a_worker_that_is_cut_off_loses_nothing_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        hub, a, b = stack.enter_context(hosts())
        queue, url = server(hub, tmp_path, stack), api(hub, tmp_path, stack)
        stack.enter_context(ended(worker(a, "a", tmp_path)))
        eventually(lambda: queue.zscore(f"{PREFIX}wk", "a"), "a is alive")
        pool = stack.enter_context(ThreadPoolExecutor(JOBS))

        first = [pool.submit(post, url, prompt=PROMPT, seed=seed) for seed in range(JOBS)]
        eventually(lambda: held_by(queue, "a"), "a draws")
        a.link("down")
        other = worker(b, "b", tmp_path)
        stack.enter_context(ended(other))
        for seed, asked in enumerate(first):
            assert asked.result().status_code == 200
            check_answer(asked.result().json(), PROMPT, [seed])
        assert int(queue.hget(f"{PREFIX}n", "redelivered") or 0) >= 1
        assert int(queue.hget(f"{PREFIX}n", "finished") or 0) == JOBS

        a.link("up")
        eventually(lambda: queue.zscore(f"{PREFIX}wk", "a") or 0, "a is back", patience_s=60)
        other.terminate()
        other.wait(PATIENCE_S)
        answer = post(url, prompt="a blue star", seed=99)
        assert answer.status_code == 200
        check_answer(answer.json(), "a blue star", [99])
        assert held_by(queue, "a") == []
