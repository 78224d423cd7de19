"""Runs ``export.engine`` in a child process, watches its memory, passes on its messages, and ends it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.engine import Order
from export.errors import ExportError

WATCH_S = 0.05
GRACE_S = 10.0
RESIDENT = "VmRSS:"


def build_engine(order: Order, memory_bytes: int, say: Callable[[str], None], work: Path) -> dict[str, Any]:
    """Build in a child process; returns its last message: ``bytes``, ``layers``, ``version``.

    Raises:
        ExportError: the library refused, the process used more than ``memory_bytes``, or it died; no files are left.
    """
    paper = work / f"{Path(order.plan).stem}.order.json"
    paper.write_text(order.to_json(), "utf-8")
    said = work / f"{Path(order.plan).stem}.said"
    command = [sys.executable, "-m", "export.engine", str(paper)]
    root = Path(__file__).resolve().parents[1]
    with said.open("wb") as noise:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, cwd=root)
        watch = _Watch(child, memory_bytes)
        watch.start()
        try:
            last = _listen(child, say)
        finally:
            _end(child)
            watch.join()
    name = Path(order.plan).stem
    if watch.exceeded:
        raise ExportError(
            f"building {name} needs more than {memory_bytes / 2**30:.1f} GiB of memory: allow more with --memory-gb"
        )
    if "error" in last:
        raise ExportError(f"{last['error']}")
    if "plan" not in last:
        end = (said.read_text("utf-8", "replace").strip().splitlines() or ["it printed nothing"])[-1]
        raise ExportError(f"the process that built {name} died with status {child.returncode}: {end}")
    paper.unlink()
    said.unlink()
    return last


def _listen(child: subprocess.Popen[str], say: Callable[[str], None]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    assert child.stdout is not None
    for line in child.stdout:
        try:
            last = json.loads(line)
        except ValueError:
            continue  # the library's own remark
        if "phase" in last:
            say(f"  {last['phase']}")
    child.wait()
    return last


def _end(child: subprocess.Popen[str]) -> None:
    """Ask first: the progress monitor ends a build between two steps."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


class _Watch(threading.Thread):
    """Kills the child when its resident memory is beyond the limit.

    An address space limit would not do: CUDA reserves far more than it uses.
    """

    def __init__(self, child: subprocess.Popen[str], limit_bytes: int) -> None:
        super().__init__(daemon=True)
        self._child = child
        self._limit = limit_bytes
        self.exceeded = False

    def run(self) -> None:
        while self._child.poll() is None:
            if resident_bytes(self._child.pid) > self._limit:
                self.exceeded = True
                self._child.kill()
                return
            time.sleep(WATCH_S)


def resident_bytes(pid: int) -> int:
    """The resident memory of a process in bytes; 0 where the system does not report it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(RESIDENT)), "")
    return int(found.split()[1]) * 1024 if found else 0
