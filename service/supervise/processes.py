"""Child processes that cannot outlive their parent, and how to end them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
STOP_POLL_S = 0.02


def spawn(
    command: Sequence[str | Path],
    *,
    dies_with_parent: signal.Signals = signal.SIGKILL,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    log: Path | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C in the terminal reaches the parent alone.

    It gets ``dies_with_parent`` when the parent is gone for whatever reason (on Linux). The kernel ties this to the
    parent's *thread*: call it from the main thread. ``log`` takes what it prints (None leaves that in the terminal);
    it runs in ``folder``.
    """
    output = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env=None if env is None else dict(env),
            pass_fds=pass_fds,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_tie_to_parent(dies_with_parent),
        )
    finally:
        if output:
            output.close()


def _tie_to_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Everything is looked up before the fork: after it, only the calls themselves are safe.
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # it died between the fork and the line above
            os._exit(1)

    return tie


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """SIGTERM, then SIGKILL for whatever is left after ``grace_s``; returns when all are gone."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(STOP_POLL_S)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
