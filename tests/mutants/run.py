"""``make mutants``: each small fault of the list, one at a time, in a copy of the project: which do no tests notice?

python -m tests.mutants.run                 all of them; the same command goes on where it was interrupted
python -m tests.mutants.run lease backoff   those whose name holds one of these words
python -m tests.mutants.run --check         only whether the list fits the code

First the tests must pass without a fault. A fault whose tests take longer than ``--patience`` counts as noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.mutants.catalogue import ListError, Mutant, read_list, selections

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "out" / "mutants.json"
SHARE = 0.95
PASSED, FAILED, BROKEN = 0, 1, 2  # pytest's exit codes; BROKEN: a file could not even be imported
LIVED, KILLED, LATE = "lived", "killed", "killed by its time"


class CannotRun(Exception):
    """One sentence: why nothing can be said of a mutant."""


def pytest(copy: Path, tests: Sequence[str], patience_s: float) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy, up to the first that fails. No byte code is kept: a file changes within its second."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
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


def judge(copy: Path, mutant: Mutant, patience_s: float) -> str:
    """What became of a mutant; the copy is as before.

    Raises:
        CannotRun: pytest ran no test.
    """
    path = copy / mutant.file
    text = path.read_text("utf-8")
    path.write_text(mutant.apply(text), "utf-8")
    try:
        done = pytest(copy, mutant.tests, patience_s)
    except subprocess.TimeoutExpired:
        return LATE
    finally:
        path.write_text(text, "utf-8")
    if done.returncode in (FAILED, BROKEN):
        return KILLED
    if done.returncode == PASSED and " passed" in done.stdout:
        return LIVED
    raise CannotRun(f"{mutant.name}: pytest ended with {done.returncode}: {_last_line(done.stdout)}")


def tracked() -> list[str]:
    """The project's files: what git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(name for name in set(listed.stdout.split("\0")) if name and (ROOT / name).is_file())


def fingerprint(files: Sequence[str]) -> str:
    """Changes with any file: results of other code are not continued."""
    whole = hashlib.sha256()
    for name in files:
        whole.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return whole.hexdigest()


@contextmanager
def copies(files: Sequence[str], count: int) -> Iterator[list[Path]]:
    """So many copies of the project, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fewstep-mutants-") as folder:
        made = [Path(folder) / str(k) for k in range(count)]
        for copy in made:
            for name in files:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        yield made


@dataclass
class Results:
    """What is known, kept after each mutant."""

    key: str
    known: dict[str, str]
    proven: list[str]  # tests that pass without a fault

    @classmethod
    def read(cls, key: str) -> Results:
        try:
            found = json.loads(RESULTS.read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("key") != key:
            return cls(key, {}, [])
        return cls(key, dict(found["known"]), list(found["proven"]))

    def keep(self) -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(vars(self), indent=1) + "\n", "utf-8")
        part.replace(RESULTS)


def prove(copy: Path, mutants: Sequence[Mutant], results: Results, patience_s: float) -> None:
    """The tests pass without a fault.

    Raises:
        CannotRun: they do not.
    """
    needed = [test for test in selections(mutants) if test not in results.proven]
    if needed:
        done = pytest(copy, needed, patience_s)
        if done.returncode != PASSED:
            raise CannotRun(f"Without any fault the tests fail: {_last_line(done.stdout)}")
        results.proven += needed
        results.keep()


def run(mutants: Sequence[Mutant], jobs: int, patience_s: float) -> dict[str, str]:
    """What became of each mutant, by its name.

    Raises:
        CannotRun: tests fail without a fault, or run at all not.
    """
    files = tracked()
    results = Results.read(fingerprint(files))
    left = [mutant for mutant in mutants if mutant.name not in results.known]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with copies(files, jobs if left else 0) as made, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("mutants", total=len(mutants), completed=len(mutants) - len(left))
        free: queue.Queue[Path] = queue.Queue()
        for copy in made:
            free.put(copy)
        if left:
            progress.update(task, description="their tests without a fault")
            prove(made[0], left, results, 10 * patience_s)
            progress.update(task, description="mutants")
        lock = threading.Lock()

        def one(mutant: Mutant) -> None:
            copy, started = free.get(), time.monotonic()
            try:
                ended = judge(copy, mutant, patience_s)
            finally:
                free.put(copy)
            with lock:
                results.known[mutant.name] = ended
                results.keep()
                progress.advance(task)
                progress.console.print(
                    f"{ended:<18} {time.monotonic() - started:4.0f} s  {mutant.name}", highlight=False
                )

        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(one, left):
                pass
    return {mutant.name: results.known[mutant.name] for mutant in mutants}


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failed or lines or ["it said nothing"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="Only mutants whose name holds one of these.")
    parser.add_argument("--check", action="store_true", help="Run nothing.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=180.0, help="Seconds for the tests of one mutant.")
    chosen = parser.parse_args()
    try:
        mutants = read_list(ROOT)
        if chosen.words:
            mutants = [mutant for mutant in mutants if any(word in mutant.name for word in chosen.words)]
        if chosen.check or not mutants:
            print(f"{len(mutants)} mutants fit the code")
            return 0
        ended = run(mutants, chosen.jobs, chosen.patience)
    except (ListError, CannotRun, subprocess.TimeoutExpired) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    lived = [name for name, end in ended.items() if end == LIVED]
    share = 1 - len(lived) / len(ended)
    print(f"{len(ended) - len(lived)} of {len(ended)} mutants are noticed ({share:.0%}; {SHARE:.0%} are needed)")
    for name in lived:
        print(f"lived: {name}")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
