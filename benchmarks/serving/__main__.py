"""fewstep and its peers side by side, on one engine: ``python -m benchmarks.serving`` (about half an hour).

Each server runs in an environment of its own, made at the first run (in the user's cache, or --environments). First
each tries its forms (workers x threads); then rounds, in which all servers have their turn one after the other, each
started, checked byte by byte against the engine, loaded and stopped; and the engine alone in each round beside them.
The same command goes on where it was interrupted. With --write, table and plot go to docs/performance.md and
docs/serving.png. A machine that does other work gives figures that are good for nothing but a try (for which
--seconds 1 --rounds 1 is enough).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.serving.contenders import CONTENDERS, Contender, Form, environment_of
from benchmarks.serving.engine import REPOSITORY, Engine
from benchmarks.serving.measure import SAMPLES, Unequal, measure, try_out
from benchmarks.serving.report import plot, ratios, table, write_between

KEPT = REPOSITORY / "out" / "serving.json"
DOCUMENT, PICTURE = REPOSITORY / "docs" / "performance.md", REPOSITORY / "docs" / "serving.png"
BATCHES = (1, 4, 8)
CODE = ("service", "student", "benchmarks/serving", "requirements")
T = TypeVar("T")


@dataclass
class State:
    """What is known, kept after each step; results of other code or another machine are not continued."""

    key: str
    forms: dict[str, dict[str, float]] = field(default_factory=dict)  # throughput by form by server
    bare_forms: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, dict[str, Any]] = field(default_factory=dict)  # points by round by server
    bare: dict[str, float] = field(default_factory=dict)  # by round

    @classmethod
    def read(cls, key: str) -> State:
        try:
            found = json.loads(KEPT.read_text("utf-8"))
        except (OSError, ValueError):
            return cls(key)
        return cls(**found) if found.get("key") == key else cls(key)

    def once(self, where: dict[str, T], name: str, what: Callable[[], T]) -> T:
        """The known value, or the one that is found now and kept."""
        if name not in where:
            where[name] = what()
            KEPT.parent.mkdir(exist_ok=True)
            part = KEPT.with_suffix(".part")
            part.write_text(json.dumps(asdict(self)), "utf-8")
            part.replace(KEPT)
        return where[name]


def fingerprint(chosen: argparse.Namespace) -> str:
    """Of the code that serves and measures, the machine and what was asked for."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", *CODE],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    whole = hashlib.sha256(repr((platform.node(), chosen.seconds, chosen.servers)).encode())
    for name in sorted({name for name in names if name and (REPOSITORY / name).is_file()}):
        whole.update(name.encode() + hashlib.sha256((REPOSITORY / name).read_bytes()).digest())
    return whole.hexdigest()


def bare(form: Form, batch: int, seconds: float) -> float:
    """Images a second of the engine alone."""
    options = {"processes": form.workers, "threads": form.threads, "batch": batch, "seconds": seconds}
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving.engine",
        *(p for n, v in options.items() for p in (f"--{n}", str(v))),
    ]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"the engine alone does not run: {ended.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(ended.stdout))


def engine_forms(cores: int) -> Iterator[tuple[Form, int]]:
    """Processes x threads that use all cores, with each batch size."""
    for workers in (count for count in range(1, cores + 1) if cores % count == 0):
        for batch in BATCHES:
            yield Form(workers, cores // workers), batch


def compare(chosen: argparse.Namespace, contenders: list[Contender], progress: Progress) -> State:
    """All steps, in order."""
    state, cores = State.read(fingerprint(chosen)), os.cpu_count() or 1
    pythons = {one.name: environment_of(one, chosen.environments, progress.console.print) for one in contenders}
    expected = _expected()
    short_s = min(4.0, chosen.seconds)
    tries = [(one, form) for one in contenders for form in one.forms(cores) if len(one.forms(cores)) > 1]
    steps = len(tries) + len(list(engine_forms(cores))) + chosen.rounds * (len(contenders) + 1)
    task = progress.add_task("", total=steps)

    def step(name: str, where: dict[str, T], key: str, what: Callable[[], T]) -> T:
        progress.update(task, description=name)
        found = state.once(where, key, what)
        progress.advance(task)
        return found

    for one, form in tries:
        forms = state.forms.setdefault(one.name, {})
        step(f"{one.name}, {form}", forms, str(form), lambda: try_out(one, pythons[one.name], form, short_s))  # noqa: B023
    for form, batch in engine_forms(cores):
        key = json.dumps([form.workers, form.threads, batch])
        step(f"engine, {form}, {batch}", state.bare_forms, key, lambda: bare(form, batch, short_s))  # noqa: B023
    workers, threads, batch = json.loads(max(state.bare_forms, key=lambda key: state.bare_forms[key]))
    for number in range(chosen.rounds):
        first = number % len(contenders)
        for one in (*contenders[first:], *contenders[:first]):
            known, form = state.rounds.setdefault(one.name, {}), best_form(state, one, cores)
            step(
                f"round {number + 1}, {one.name}", known, str(number),
                lambda: measure(one, pythons[one.name], form, expected, chosen.seconds, number),  # noqa: B023
            )  # fmt: skip
        step(
            f"round {number + 1}, engine", state.bare, str(number),
            lambda: bare(Form(workers, threads), batch, chosen.seconds),
        )  # fmt: skip
    return state


def best_form(state: State, contender: Contender, cores: int) -> Form:
    """The form with the largest throughput."""
    known = state.forms.get(contender.name, {})
    return max(contender.forms(cores), key=lambda form: known.get(str(form), 0.0))


def _expected() -> dict[tuple[str, int], str]:
    engine = Engine(1)
    return {(prompt, seed): engine.answer([prompt], [seed])[0]["data"][0]["sha256"] for prompt, seed in SAMPLES}


def summary(state: State, contenders: list[Contender]) -> str:
    """What is written into the document."""
    cores = os.cpu_count() or 1
    forms = {one.name: str(best_form(state, one, cores)) for one in contenders}
    rounds = {one.name: list(state.rounds[one.name].values()) for one in contenders}
    alone = list(state.bare.values())
    workers, threads, batch = json.loads(max(state.bare_forms, key=lambda key: state.bare_forms[key]))
    said = (
        f"{len(alone)} interleaved rounds on {cores} cores ({platform.machine()}); medians, in brackets the smallest "
        "and largest round. Forms are workers x threads. The engine alone, all work of an answer included, in its "
        f"best form ({workers} x {threads}, batches of {batch}): {statistics.median(alone):.1f} images/s. Every "
        "server's pictures were equal to the engine's, byte by byte. Goodput is a share of each one's own throughput "
        "at 32 users: clients leave after 2 s, or a deadline of 1.5 s is set where the server has one."
    )
    return f"{said}\n\n{table(rounds, forms)}\n\n{ratios(rounds, alone)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("servers", nargs="*", help="Only these, by name: " + ", ".join(one.name for one in CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each point.")
    parser.add_argument("--environments", type=Path, default=cache / "fewstep" / "serving")
    parser.add_argument("--write", action="store_true", help="Write table and plot into docs/.")
    chosen = parser.parse_args()
    contenders = [one for one in CONTENDERS if not chosen.servers or one.name in chosen.servers]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            state = compare(chosen, contenders, progress)
    except (RuntimeError, Unequal) as error:
        print(f"serving: {error}", file=sys.stderr)
        return 1
    text = summary(state, contenders)
    print(text)
    if chosen.write:
        write_between(DOCUMENT, f"{text}\n![Throughput and latency by the number of users](serving.png)")
        plot(
            {one.name: list(state.rounds[one.name].values()) for one in contenders}, list(state.bare.values()), PICTURE
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
