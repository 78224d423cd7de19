"""How many images share a call, on the service itself: ``python -m benchmarks.batch_policies``.

The starter student is served three times in each round, in turn: with ``FEWSTEP_BATCH`` at the largest batch, by the
rule, and with 1. Users who never pause give each one's throughput; then requests arrive at random, for all of them at
shares of the first one's throughput. --write puts the table into docs/performance.md. About nine minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.request_life import DOCUMENT
from benchmarks.serving.contenders import CONTENDERS, Contender, Form
from benchmarks.serving.measure import Figures, closed, open_, running
from benchmarks.serving.report import write_between

BEGIN, END = "<!-- policies: begin -->", "<!-- policies: end -->"
POLICIES = {"what waits, up to 8": 8, "the rule": 0, "one image": 1}  # the first one's throughput sets the rates
USERS, SHARES = (8, 32), (0.4, 0.6, 0.8)
WARM_S = 3.0


@dataclass(frozen=True)
class Batched(Contender):
    """The service with a setting of its own."""

    batch: int = 0

    def environment(self, python: Path, port: int, data: Path) -> dict[str, str]:
        return {**super().environment(python, port, data), "FEWSTEP_BATCH": str(self.batch)}


def measure(batch: int, seconds: float, seed: int, most: float | None) -> dict[str, Figures]:
    """One policy in one round; ``most`` answers a second count as the whole load, by default its own throughput."""
    [ours] = [one for one in CONTENDERS if one.name == "fewstep"]
    policy = Batched(ours.name, ours.module, body=ours.body, batch=batch)
    with running(policy, Path(sys.executable), Form(0, 0)) as server:
        closed(server, USERS[0], WARM_S)
        found = {f"{users} users": closed(server, users, seconds) for users in USERS}
        whole = most or found[f"{USERS[-1]} users"]["per_s"]
        for share in SHARES:
            found[f"{share:.0%}"] = open_(server, share * whole, seconds, seed)
        return found


def table(rounds: dict[str, list[dict[str, Figures]]]) -> str:
    """A row for each policy: medians over the rounds, with the smallest and largest."""

    def cell(found: Sequence[dict[str, Figures]], point: str, *names: str) -> str:
        said = []
        for name in names:
            values = [one[point][name] * (1 if name == "per_s" else 1000) for one in found]
            said.append(f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})")
        return ", ".join(said)

    heads = [*(f"{users} users: answers/s" for users in USERS), *(f"{share:.0%}: p50, p99 ms" for share in SHARES)]
    lines = ["| | " + " | ".join(heads) + " |", "|--" + "|--:" * len(heads) + "|"]
    for policy, found in rounds.items():
        cells = [cell(found, f"{users} users", "per_s") for users in USERS]
        cells += [cell(found, f"{share:.0%}", "p50_s", "p99_s") for share in SHARES]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.batch_policies", description=__doc__, formatter_class=form)
    parser.add_argument("--seconds", type=float, default=10.0, help="Of each load.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="Write the table into docs/performance.md.")
    arguments = parser.parse_args(argv)
    rounds: dict[str, list[dict[str, Figures]]] = defaultdict(list)
    for number in range(arguments.rounds):
        most: float | None = None
        for policy, batch in POLICIES.items():
            found = measure(batch, arguments.seconds, number, most)
            most = most or found[f"{USERS[-1]} users"]["per_s"]
            rounds[policy].append(found)
            print(f"round {number + 1} of {arguments.rounds}, {policy}: {found}", flush=True)
    shown = table(rounds)
    print(shown)
    if arguments.write:
        write_between(DOCUMENT, shown, BEGIN, END)


if __name__ == "__main__":
    main()
