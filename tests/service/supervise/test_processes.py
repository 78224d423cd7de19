"""Children of the supervisor: they end with it, and they end when told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.supervise.processes import spawn, stop
from tests.service.support import REPOSITORY, alive, eventually

PARENT = """
import sys
from service.supervise.processes import spawn

child = spawn([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
sys.stdin.read()
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_child_does_not_outlive_a_killed_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    eventually(lambda: not alive(pid), "the child is gone")


def test_a_child_that_ignores_the_request_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    log = tmp_path / "log"
    deaf = spawn([sys.executable, "-c", DEAF], log=log)
    polite = spawn([sys.executable, "-c", "import time; time.sleep(600)"])
    eventually(lambda: "deaf" in log.read_text(), "the child is deaf")
    stop([deaf, polite], grace_s=0.2)
    assert (deaf.returncode, polite.returncode) == (-9, -15)
