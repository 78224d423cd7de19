"""The comparison's report: which claims hold and which do not, tables, and plots, from the results alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.lab import plots
from training.lab.cells import ABLATION_NFE, METHODS, NFES, VARIANTS, base
from training.lab.run import Result
from training.lab.statistics import Estimate, difference, estimate

# The paper's HPSv2.1 (x 100) on FLUX.1-dev: its student, and the plain model at as many steps (anchors: RATS, table 1).
Rows = Sequence[Mapping[str, float]]
Found = Mapping[int, Estimate]
PAPER = {3: (32.15, 18.43), 5: (32.16, 26.12), 8: (33.81, 28.43)}
PAPER_TEACHER = 30.00
OPENING = """```bash
make install
.venv/bin/python -m training.lab --plan    # the runs and their hours; without --plan it trains them
```
"""
MEASURES = ("trained", "heldout", "right", "diversity", "distance")


def values(result: Result, measure: str) -> list[float]:
    """One run's figures by prompt."""
    if measure == "right":
        return result.judge["right"]
    found: list[float] = getattr(result, measure)
    return found


class Table:
    """The results by method and step count."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)

    def runs(self, method: str, nfe: int, measure: str) -> list[list[float]]:
        """Each seed's figures by prompt; the seeds in order."""
        rows = [r for r in self.results if r.method == method and r.nfe == nfe]
        return [values(r, measure) for r in sorted(rows, key=lambda r: r.seed)]

    def difference(self, ours: tuple[str, int], theirs: tuple[str, int], measure: str) -> Estimate | None:
        """ours - theirs, paired; None where one is missing."""
        a, b = self.runs(*ours, measure), self.runs(*theirs, measure)
        if not a or not b:
            return None
        shared = min(len(a), len(b)) if theirs[0] != "teacher" else len(a)
        return difference(a[:shared], b[:shared] if theirs[0] != "teacher" else b)

    def gain(self, method: str, nfe: int, measure: str) -> list[list[float]]:
        """The method's figures minus the teacher's at as many steps, by seed and prompt; empty where one is missing."""
        ours, teachers = self.runs(method, nfe, measure), self.runs("teacher", nfe, measure)
        if not ours or not teachers:
            return []
        return [[a - b for a, b in zip(run, teachers[0], strict=True)] for run in ours]


def write(results: Sequence[Result], folder: Path, missing: int, logs: Mapping[str, Rows]) -> None:
    """README.md, cells.csv and the plots; ``logs`` are the runs' step logs by key."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(results)
    _csv(results, folder / "cells.csv")
    plots.quality(table.results, folder / "quality.png")
    plots.curves(table.results, logs, folder / "curves.png")
    plots.frontier(table.results, folder / "frontier.png")
    text = [
        "# The methods compared\n",
        OPENING,
        _summary(table, missing),
        "Figures are means over the 512 test prompts of the starter world and over training seeds, ± one standard "
        "error over prompts and seeds together; differences are paired prompt by prompt. Scores are in the teacher's "
        'standard deviations above its mean. "Right" is the exact judge: everything the prompt says is true of the '
        "picture. Distance is the mean squared difference to the 50-step teacher's picture from the same noise. The "
        "error of rows with one seed does not include the training seed; they are marked (1).\n",
        "![quality against the number of steps](quality.png)\n",
        *_methods(table),
        *_one_seed(table),
        "## What a score costs\n\nA reward is easily raised by drawing the same picture for every seed. To the right "
        "of the dotted line at least nine tenths of the 50-step teacher's diversity are kept, which `training.run` "
        "requires of a checkpoint; these runs had no such limit.\n\n"
        "![held-out score against diversity](frontier.png)\n",
        _gates(table, logs),
        "## Reward while training\n\nThe student's and the teacher's reward on each step's prompts, and the gap "
        "between them: here (mean over the seeds), and as read from the figure on the authors' page (HPSv2.1 on "
        "FLUX.1-dev). The teacher here is guided for the first two thirds of a run and then follows the student.\n\n"
        "![reward curves](curves.png)\n",
        _paper(table),
        "All runs: [cells.csv](cells.csv). To repeat them: `python -m training.lab --preset shapes`.\n",
    ]
    (folder / "README.md").write_text("\n".join(text))


def _summary(table: Table, missing: int) -> str:
    """What holds, a table of the claims on the held-out scorer, and then every claim on the other measures."""
    claims = [(words, _found(table, ours, others, "heldout")) for ours, words, others in _claims()]
    known = [(words, found) for words, found in claims if found]
    rows = [[_capital(words), *(_cell(found.get(nfe)) for nfe in NFES)] for words, found in known]
    gains = _largest_gain(table)
    if gains:
        rows.append([f"{gains[0]}: {gains[-1]}", *gains[1:-1]])
    head = ["on the held-out scorer, on which nothing here was trained", *(f"{nfe} steps" for nfe in NFES)]
    lines = [
        _claim(f"{words} at {nfe} steps ({measure})", found)
        for ours, words, others in _claims()
        for measure in ("right", "diversity")
        for nfe, found in _found(table, ours, others, measure).items()
    ]
    return (
        _first(known, gains, _cost(table), missing)
        + "\n\n"
        + _markdown(head, rows)
        + "\nThe same claims by the exact judge, and by diversity:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _first(known: Sequence[tuple[str, Found]], gains: Sequence[str], cost: str, missing: int) -> str:
    """A list: what holds, what does not, what is undecided, and by how much."""
    said = [f"**{missing} of the planned runs are missing; what follows is from the others.**"] if missing else []
    for verdict, opening in (
        ("holds", "On the held-out scorer, in the teacher's standard deviations, these claims hold"),
        ("does not hold", "These are contradicted"),
        ("is not decided", "These are undecided, within two standard errors of 0"),
    ):
        parts = [_where(words, found, verdict) for words, found in known]
        if any(parts):
            said.append("\n  - ".join([f"{opening}:", *(part for part in parts if part)]))
    if gains:
        said.append(
            f"That the gain over a teacher with equally many steps is largest at {min(NFES)} steps {gains[-1]}."
        )
    return "\n".join(f"- {part}" for part in (*said, cost) if part)


def _where(words: str, found: Found, verdict: str) -> str:
    figures = [f"{nfe} steps {estimate.mean:+.3f}" for nfe, estimate in found.items() if estimate.verdict == verdict]
    return f"{words} ({', '.join(figures)})" if figures else ""


def _found(table: Table, ours: str, others: Mapping[int, tuple[str, int]], measure: str) -> Found:
    found = {nfe: table.difference((ours, nfe), other, measure) for nfe, other in others.items()}
    return {nfe: estimate for nfe, estimate in found.items() if estimate is not None}


def _cell(found: Estimate | None) -> str:
    return f"{found.verdict}, {found}" if found else "-"


def _claims() -> list[tuple[str, str, dict[int, tuple[str, int]]]]:
    """(method, what is claimed of it, what it is compared with at each step count): the paper's, then our own."""
    reference = dict.fromkeys(NFES, ("teacher", base().teacher.reference_nfe))
    against = {name: {nfe: (name, nfe) for nfe in NFES} for name in ("RATS", "constant gate", "reward only")}
    paper = [
        ("RATS", "the student is above the 50-step teacher", reference),
        ("RATS", "the gate beats a constant gate", against["constant gate"]),
        ("RATS", "shaping beats reward only", against["reward only"]),
    ]
    ours = [
        (name, f"{name} is above {words}", others)
        for name in VARIANTS
        for words, others in (
            ("the 50-step teacher", reference),
            ("RATS", against["RATS"]),
            ("reward only", against["reward only"]),
        )
    ]
    return [*paper, *ours]


def _largest_gain(table: Table) -> list[str]:
    """A row of the claims' table, and the verdict last: the gain at the fewest steps against that at each other count.

    The gain is over the teacher at as many steps; two gains are compared prompt by prompt and seed by seed.
    """
    gains = {nfe: table.gain("RATS", nfe, "heldout") for nfe in NFES}
    if not all(gains.values()):
        return []
    fewest, *others = NFES
    leads = [difference(gains[fewest], gains[nfe]) for nfe in others]
    verdict = "holds" if all(lead.holds for lead in leads) else "does not hold"
    if verdict != "holds" and not any(lead.verdict == "does not hold" for lead in leads):
        verdict = "is not decided"
    by = ", ".join(f"{lead} more than at {nfe}" for nfe, lead in zip(others, leads, strict=True))
    cells = [str(estimate(gains[nfe])) for nfe in NFES]
    return ["The gain over the teacher at equally many steps is largest at the fewest", *cells, f"{verdict} ({by})"]


def _cost(table: Table) -> str:
    """What reward only pays for its score."""
    kept = {name: _kept(table, name, ABLATION_NFE) for name in ("reward only", "RATS", *VARIANTS)}
    figures = ", ".join(f"{name} {share:.0%}" for name, share in kept.items() if share is not None)
    if not figures:
        return ""
    return f"The shares of the 50-step teacher's diversity that are kept at {ABLATION_NFE} steps: {figures}."


def _kept(table: Table, method: str, nfe: int) -> float | None:
    ours = table.runs(method, nfe, "diversity")
    teachers = table.runs("teacher", base().teacher.reference_nfe, "diversity")
    return estimate(ours).mean / estimate(teachers).mean if ours and teachers else None


def _gates(table: Table, logs: Mapping[str, Rows]) -> str:
    """How far the gate moved in each run that had one: a gate that does not move is a constant."""
    names = ("gate_mean", "gate_std", "gap_std", "share_ahead")
    found = []
    for result in table.results:
        rows = [row for row in logs.get(result.key, ()) if row.get("gate_std")]
        if rows and result.nfe == ABLATION_NFE:
            means = [f"{sum(row[name] for row in rows) / len(rows):.2f}" for name in names]
            found.append([result.method, str(result.seed), *means])
    if not found:
        return ""
    head = ["method", "seed", "gate", "its std in a batch", "std of the gap", "share of samples ahead"]
    return (
        "## What the gate did\n\nMeans over a run's steps. A gate whose standard deviation is small beside its mean "
        "weights all samples alike, as a constant gate does.\n\n" + _markdown(head, found)
    )


def _claim(words: str, found: Estimate) -> str:
    note = " (1)" if found.seeds == 1 else ""
    return f"- {_capital(words)}: **{found.verdict}**, {found}{note}."


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _methods(table: Table) -> list[str]:
    parts = []
    for nfe in NFES:
        names = ["teacher", *METHODS, *VARIANTS]
        rows = [_row(table, name, nfe) for name in names]
        parts.append(f"## {nfe} steps\n\n" + _markdown(["method", "seeds", *MEASURES], [row for row in rows if row]))
    return parts


def _one_seed(table: Table) -> list[str]:
    methods = list(dict.fromkeys(r.method for r in table.results if r.part in ("baseline", "ablation")))
    rows = [_row(table, name, ABLATION_NFE) for name in ("RATS", *methods)]
    if not methods:
        return []
    title = f"## Baselines and ablations at {ABLATION_NFE} steps, one seed\n\n"
    return [title + _markdown(["method", "seeds", *MEASURES], [row for row in rows if row])]


def _row(table: Table, method: str, nfe: int) -> list[str]:
    runs = {measure: table.runs(method, nfe, measure) for measure in MEASURES}
    if not runs["trained"]:
        return []
    cells = [estimate(runs[measure]) for measure in MEASURES]
    return [method, str(cells[0].seeds), *(f"{cell.mean:.3f} ± {cell.error:.3f}" for cell in cells)]


def _paper(table: Table) -> str:
    """The published figures beside their rows; other models and scorers, so only the signs compare."""
    rows = []
    for nfe, ours in zip(PAPER, NFES, strict=True):
        student, plain = PAPER[nfe]
        found = table.difference(("RATS", ours), ("teacher", base().teacher.reference_nfe), "heldout")
        here = str(found) if found else "-"
        rows.append(
            [f"{nfe} NFE", f"{student:.2f}", f"{plain:.2f}", f"{student - PAPER_TEACHER:+.2f}", f"{ours} NFE", here]
        )
    head = [
        "paper",
        "student HPSv2.1",
        "plain model",
        "student - 50-step model",
        "here",
        "student - 50-step teacher, held out",
    ]
    return "## The paper's figures (FLUX.1-dev) beside ours\n\n" + _markdown(head, rows)


def _markdown(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["key", "method", "part", "nfe", "seed", *(f"{m}_{x}" for m in MEASURES for x in ("mean", "error"))]
        )
        for result in results:
            cells = [estimate([values(result, measure)]) for measure in MEASURES]
            numbers = [f"{number:.5f}" for cell in cells for number in (cell.mean, cell.error)]
            out.writerow([result.key, result.method, result.part, result.nfe, result.seed, *numbers])
