"""``make mutants``: each small fault of the list, one at a time, in a copy of the project: which do no tests notice?

python -m tests.mutants.run                 in random order, for an hour; the same command goes on
python -m tests.mutants.run lease backoff   those whose name holds one of these words
python -m tests.mutants.run --minutes 0     all of them
python -m tests.mutants.run --check         only whether the list fits the code

In the end the tests that noticed a fault must pass without one. A fault whose tests take longer than ``--patience``
with it, and not without it, counts as noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.mutants.catalogue import ListError, Mutant, read_list
from tests.mutants.judge import LIVED, UNKNOWN, CannotRun, Verdict, judge, prove

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "out" / "mutants.json"
SHARE = 0.95
FOR_MUTANTS = 0.85  # of the time; the rest is for their tests without a fault
PROOF_S = 1800.0


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
    known: dict[str, Verdict]
    proven: list[str]  # tests that noticed a mutant, and pass without it

    @classmethod
    def read(cls, key: str) -> Results:
        try:
            found = json.loads(RESULTS.read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("key") != key:
            return cls(key, {}, [])
        known = {name: Verdict(one["ended"], tuple(one["by"])) for name, one in found["known"].items()}
        return cls(key, known, list(found["proven"]))

    def keep(self) -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        part.replace(RESULTS)

    def unproven(self) -> list[str]:
        """The tests that noticed something and have not run without a fault yet, those of a file together."""
        return sorted({test for verdict in self.known.values() for test in verdict.by}.difference(self.proven))


def run(mutants: Sequence[Mutant], jobs: int, patience_s: float, minutes: float = math.inf) -> dict[str, Verdict]:
    """What became of each mutant that there was time for, by its name.

    Raises:
        CannotRun: tests that noticed a fault fail without one, too.
    """
    until = time.monotonic() + FOR_MUTANTS * minutes * 60
    files = tracked()
    results = Results.read(fingerprint(files))
    left = [mutant for mutant in mutants if mutant.name not in results.known]
    random.Random(results.key).shuffle(left)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        copies(files, jobs if left or results.unproven() else 0) as made,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("mutants", total=len(mutants), completed=len(mutants) - len(left))
        free: queue.Queue[Path] = queue.Queue()
        for copy in made:
            free.put(copy)
        lock = threading.Lock()

        def one(mutant: Mutant) -> None:
            if time.monotonic() >= until:
                return
            copy, started = free.get(), time.monotonic()
            try:
                verdict = judge(copy, mutant, patience_s)
            except CannotRun as error:  # one that is too slow here must not cost the others
                verdict = Verdict(UNKNOWN)
                progress.console.print(str(error), highlight=False)
            finally:
                free.put(copy)
            with lock:
                results.known[mutant.name] = verdict
                results.keep()
                progress.advance(task)
                progress.console.print(
                    f"{verdict.ended:<18} {time.monotonic() - started:4.0f} s  {mutant.name}", highlight=False
                )

        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(one, left):
                pass
            progress.update(task, description="their tests without a fault")
            _prove(results, made, pool)
    return {mutant.name: results.known[mutant.name] for mutant in mutants if mutant.name in results.known}


def _prove(results: Results, made: Sequence[Path], pool: ThreadPoolExecutor) -> None:
    """Run what noticed a mutant without any, in all copies at once; tests of one file stay together."""
    tests = results.unproven()
    files = sorted({test.partition("::")[0] for test in tests})
    shares: list[list[str]] = [[] for _ in made]
    for test in tests:
        shares[files.index(test.partition("::")[0]) % len(made)].append(test)
    for _ in pool.map(lambda copy, share: prove(copy, share, PROOF_S) if share else None, made, shares):
        pass
    results.proven += tests
    if tests:
        results.keep()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="Only mutants whose name holds one of these.")
    parser.add_argument("--check", action="store_true", help="Run nothing.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=180.0, help="Seconds for the tests of one mutant.")
    parser.add_argument("--minutes", type=float, default=60.0, help="About how long in all; 0: until all are tried.")
    chosen = parser.parse_args()
    try:
        mutants = read_list(ROOT)
        if chosen.words:
            mutants = [mutant for mutant in mutants if any(word in mutant.name for word in chosen.words)]
        if chosen.check or not mutants:
            print(f"{len(mutants)} mutants fit the code")
            return 0
        ended = run(mutants, chosen.jobs, chosen.patience, chosen.minutes or math.inf)
    except (ListError, CannotRun, subprocess.TimeoutExpired) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    return _say(ended, len(mutants))


def _say(ended: dict[str, Verdict], of: int) -> int:
    """Print which lived; returns the exit status."""
    lived = [name for name, verdict in ended.items() if verdict.ended in (LIVED, UNKNOWN)]
    share = 1 - len(lived) / len(ended)
    print(f"{len(ended) - len(lived)} of {len(ended)} mutants are noticed ({share:.0%}; {SHARE:.0%} are needed)")
    if len(ended) < of:
        print(f"{of - len(ended)} are left: the same command goes on with them")
    for name in lived:
        print(f"{ended[name].ended}: {name}")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
