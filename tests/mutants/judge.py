"""What becomes of one mutant in a copy of the project, and whether the tests that noticed it pass without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.catalogue import Mutant

PASSED, FAILED, BROKEN = 0, 1, 2  # pytest's exit codes; BROKEN: a file could not even be imported
NOT_FOUND = 4  # and that is what it says of such a file's test
LIVED, KILLED, LATE, UNKNOWN = "lived", "killed", "killed by its time", "cannot be judged"
CACHE = ".mutants"


class CannotRun(Exception):
    """One sentence: why nothing can be said of a mutant."""


@dataclass(frozen=True)
class Verdict:
    """How a mutant ended, and the tests (pytest's ids) that failed with it."""

    ended: str
    by: tuple[str, ...] = ()


def judge(copy: Path, mutant: Mutant, patience_s: float) -> Verdict:
    """What became of a mutant; the copy is as before.

    Raises:
        CannotRun: pytest ran no test, or the tests take too long without the fault too.
    """
    path = copy / mutant.file
    text = path.read_text("utf-8")
    path.write_text(mutant.apply(text), "utf-8")
    try:
        done = pytest(copy, ["-x", *mutant.tests], patience_s)
    except subprocess.TimeoutExpired:
        done = None
    finally:
        path.write_text(text, "utf-8")
    if done is None:
        return _late(copy, mutant, patience_s)
    if done.returncode in (FAILED, BROKEN):
        return Verdict(KILLED, failed(copy))
    if done.returncode == PASSED and " passed" in done.stdout:
        return Verdict(LIVED)
    if done.returncode == NOT_FOUND and pytest(copy, mutant.tests, patience_s).returncode == PASSED:
        return Verdict(KILLED, mutant.tests)
    raise CannotRun(f"{mutant.name}: pytest ended with {done.returncode}: {_last_line(done.stdout)}")


def prove(copy: Path, tests: Sequence[str], patience_s: float) -> None:
    """Tests pass without a fault.

    Raises:
        CannotRun: they do not.
    """
    done = pytest(copy, tests, patience_s)
    if done.returncode != PASSED:
        raise CannotRun(f"Without any fault the tests fail: {_last_line(done.stdout)}")


def pytest(copy: Path, arguments: Sequence[str], patience_s: float) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy. No byte code is kept: a file changes within its second."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    shutil.rmtree(copy / CACHE, ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-o", f"cache_dir={CACHE}", *arguments]
    process = subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # servers that a test started are in the same session
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def failed(copy: Path) -> tuple[str, ...]:
    """The ids of the tests, or the files, that failed in the last run."""
    return tuple(json.loads((copy / CACHE / "v" / "cache" / "lastfailed").read_text("utf-8")))


def _late(copy: Path, mutant: Mutant, patience_s: float) -> Verdict:
    try:
        prove(copy, mutant.tests, patience_s)
    except subprocess.TimeoutExpired:
        raise CannotRun(f"{mutant.name}: its tests take longer than {patience_s:g} s without it too") from None
    return Verdict(LATE)


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failures or lines or ["it said nothing"])[-1]
