"""A Docker engine for the test: a running one, else one that is started and stopped by the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
BRIDGE = "docker0"


class NoEngine(Exception):
    """No engine answers and none can be started; the message says why."""


@dataclass(frozen=True)
class Engine:
    """``environment`` is what docker and docker-compose need to reach it."""

    environment: Mapping[str, str]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command against the engine; returns what it printed on stdout."""
        done = subprocess.run(command, env=dict(self.environment), check=check, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    @property
    def compose(self) -> Sequence[str]:
        """The command of Compose: the plugin if it is installed, else the older program.

        Raises:
            NoEngine: neither is installed.
        """
        plugin = subprocess.run(["docker", "compose", "version"], env=dict(self.environment), capture_output=True)
        if plugin.returncode == 0:
            return ("docker", "compose")
        if shutil.which("docker-compose"):
            return ("docker-compose",)
        raise NoEngine("docker compose is not installed")


@contextmanager
def engine(environment: Mapping[str, str], data_root: Path | None) -> Iterator[Engine]:
    """A running engine; one that had to be started keeps its data in ``data_root`` and is stopped with the context.

    Raises:
        NoEngine: there is none, with the reason.
    """
    if not shutil.which("docker"):
        raise NoEngine("docker is not installed")
    found = Engine(environment)
    if _answers(found):
        yield found
        return
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        raise NoEngine("no Docker engine answers, and only root can start one (with dockerd installed)")
    with tempfile.TemporaryDirectory(prefix="fewstep-docker-") as folder:
        with _daemon(Path(folder), data_root or Path(folder) / "data") as socket:
            yield Engine({**environment, "DOCKER_HOST": f"unix://{socket}"})


@contextmanager
def _daemon(folder: Path, data_root: Path) -> Iterator[Path]:
    socket, log = folder / "docker.sock", folder / "dockerd.log"
    command = ["dockerd", "--host", f"unix://{socket}", "--data-root", str(data_root)]
    command += ["--exec-root", str(folder / "run"), "--pidfile", str(folder / "pid")]
    bridged = _has_bridge()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        started = Engine({**os.environ, "DOCKER_HOST": f"unix://{socket}"})
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(started):
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoEngine("dockerd does not start: " + " ".join(log.read_text("utf-8").splitlines()[-1:]))
            time.sleep(0.5)
        yield socket
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _unmount_below(folder)
        if _has_bridge() and not bridged and shutil.which("ip"):
            subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def _has_bridge() -> bool:
    """Whether this host has the network that dockerd creates and does not remove."""
    return Path("/sys/class/net", BRIDGE).exists()


def _unmount_below(folder: Path) -> None:
    """Unmount the network namespace that dockerd leaves mounted."""
    for line in Path("/proc/self/mounts").read_text("utf-8").splitlines():
        target = line.split()[1]
        if Path(target).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", target], check=False)


def _answers(candidate: Engine) -> bool:
    asked = subprocess.run(["docker", "version"], env=dict(candidate.environment), capture_output=True)
    return asked.returncode == 0
