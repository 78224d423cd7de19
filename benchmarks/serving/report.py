"""Rounds become a table of medians with their spread, ratios, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.serving.measure import USERS, Figures

Rounds = Mapping[str, Sequence[Mapping[str, Figures]]]  # by server
BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"
OURS, BATCHER_FREE = "fewstep", "plain FastAPI"
TITLES = (
    "", "form", *(f"{users} user{'s' * (users > 1)}: answers/s, p50 ms" for users in USERS), f"p99 ms at {USERS[-1]}",
    f"CPU ms an answer at {USERS[-1]}", "open at 70 %: p50, p99 ms", "goodput at 2x: no deadline, deadline",
    "MiB", "first picture s",
)  # fmt: skip


def middle(rounds: Sequence[Mapping[str, Figures]], point: str, name: str) -> float:
    """The median of a figure over the rounds."""
    values = [one[point][name] for one in rounds if point in one and not math.isnan(one[point][name])]
    return statistics.median(values) if values else float("nan")


def shown(rounds: Sequence[Mapping[str, Figures]], point: str, name: str, scale: float = 1.0, digits: int = 0) -> str:
    """A median, and in brackets the smallest and largest of the rounds."""
    values = [scale * one[point][name] for one in rounds if point in one and not math.isnan(one[point][name])]
    if not values:
        return "-"
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if len(values) > 1 else "")


def table(found: Rounds, forms: Mapping[str, str]) -> str:
    """A row for each server."""
    lines = ["| " + " | ".join(TITLES) + " |", "|--|--" + "|--:" * (len(TITLES) - 2) + "|"]
    for name, rounds in found.items():
        cells = [name, forms[name]]
        for users in USERS:
            point = f"closed {users}"
            cells.append(f"{shown(rounds, point, 'per_s', digits=1)}, {1e3 * middle(rounds, point, 'p50_s'):.0f}")
        most = f"closed {USERS[-1]}"
        saturation = middle(rounds, most, "per_s")
        good = [middle(rounds, point, "goodput_per_s") / saturation for point in ("overload", "overload, deadline")]
        cells += [
            shown(rounds, most, "p99_s", 1e3),
            shown(rounds, most, "cpu_s", 1e3, 1),
            f"{shown(rounds, 'open', 'p50_s', 1e3)}, {shown(rounds, 'open', 'p99_s', 1e3)}",
            ", ".join("-" if math.isnan(share) else f"{share:.2f}" for share in good),
            f"{middle(rounds, 'start', 'rss_mib'):.0f}",
            f"{middle(rounds, 'start', 'first_s'):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(found: Rounds, bare: Sequence[float]) -> str:
    """The service against the best peer, and against the engine alone; each of medians."""
    if OURS not in found or len(found) < 2:
        return ""
    ours = found[OURS]
    peers = {name: rounds for name, rounds in found.items() if name != OURS}

    def best(point: str, name: str, largest: bool) -> tuple[float, str]:
        known = [(middle(rounds, point, name), peer) for peer, rounds in peers.items()]
        known = [one for one in known if not math.isnan(one[0])]
        return (max if largest else min)(known, default=(float("nan"), "nobody"))

    lines = ["| ratio | fewstep to | |", "|--|--|--:|"]
    for users in USERS[1:]:
        value, peer = best(f"closed {users}", "per_s", True)
        lines.append(
            f"| throughput at {users} users | {peer} | {middle(ours, f'closed {users}', 'per_s') / value:.2f} |"
        )
    most = f"closed {USERS[-1]}"
    if bare:
        alone = middle(ours, most, "per_s") / statistics.median(bare)
        lines.append(f"| throughput at {USERS[-1]} users | the engine alone, in its best form | {alone:.2f} |")
    if BATCHER_FREE in peers:
        value = middle(ours, "closed 1", "p50_s") / middle(peers[BATCHER_FREE], "closed 1", "p50_s")
        lines.append(f"| p50 of one user | {BATCHER_FREE} | {value:.2f} |")
    value, peer = best("open", "p99_s", False)
    ratio = middle(ours, "open", "p99_s") / value
    lines.append(f"| p99 of open arrivals at 70 % of each one's saturation | {peer} | {ratio:.2f} |")
    value, peer = best(most, "cpu_s", False)
    lines.append(f"| CPU of an answer at {USERS[-1]} users | {peer} | {middle(ours, most, 'cpu_s') / value:.2f} |")
    return "\n".join(lines)


def plot(found: Rounds, bare: Sequence[float], file: Path) -> None:
    """Throughput and p50 by the number of users."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for name, rounds in found.items():
        for axis, key, scale in ((rates, "per_s", 1.0), (times, "p50_s", 1e3)):
            values = [[scale * one[f"closed {users}"][key] for one in rounds] for users in USERS]
            mid = [statistics.median(each) for each in values]
            pairs = list(zip(mid, values, strict=True))
            spread = [[m - min(v) for m, v in pairs], [max(v) - m for m, v in pairs]]
            axis.errorbar(USERS, mid, yerr=spread, label=name, marker="o", capsize=3)
    if bare:
        rates.axhline(statistics.median(bare), linestyle="--", color="gray", label="the engine alone")
    for axis, label in ((rates, "answers a second"), (times, "p50, ms")):
        axis.set(xlabel="users", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(USERS, [str(users) for users in USERS])
    rates.legend()
    figure.savefig(file, format="png", dpi=110)


def write_between(file: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put a text between two marks of a document; without them, at its end."""
    whole = file.read_text("utf-8") if file.is_file() else "# Performance\n"
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin in whole and end in whole:
        before, _, rest = whole.partition(begin)
        whole = before + block + rest.partition(end)[2]
    else:
        whole = f"{whole.rstrip()}\n\n{block}\n"
    file.write_text(whole, "utf-8")
