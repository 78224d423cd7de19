"""The laboratory's report, from results alone."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from training.lab import plots
from training.lab.cells import METHODS, NFES, REWARD_ONLY, SEEDS
from training.lab.gates import STRATA
from training.lab.outcome import BOTH, HIGH, LOW, Claim, Outcome
from training.lab.references import AUTOENCODER, TRUTH, teacher_name
from training.lab.stops import Figures
from training.lab.teachers import GOOD, HETEROGENEOUS, TEACHERS

TEXT = """# When does a reward gate beat a constant weight?

```bash
make install
.venv/bin/python -m training.lab --plan    # the runs and their hours
```

Written by `python -m training.lab` from its results. `docs/science.md` registered the question, the outcome and the
claims before the runs. {state}

## The three claims

The area under the curve of the exact judge against diversity, {low:g} to {high:g} of the good teacher's; ± one
standard error over training seeds and prompts; p is two-sided and corrected for three claims (Holm). The claims are
about the heterogeneous teacher; the good one shows whether anything is lost there.

{claims}
## The confidence gate

Added and registered after the main comparison had begun and before its own runs (docs/science.md); corrected for
three claims of its own.

{added}
{teachers}## Reward only, until it gets worse

{overoptimised}
## The gate by stratum

Means over all steps of all runs. A gate whose weight is the same in both strata chooses nothing.

{gates}
![gate by stratum](gates.png)

All areas by seed: [areas.csv](areas.csv). Every run, prompt by prompt: [runs.jsonl.gz](runs.jsonl.gz), which
`python -m training.lab` takes over and `python -m training.lab repeat --cell ...` holds a new run against.
"""
SHOWN = ("right", "trained", "heldout")


def write(outcome: Outcome, folder: Path, missing: int, checks: Mapping[str, Mapping[str, float]]) -> None:
    """README.md with its plots and areas.csv; ``checks`` are the teachers' figures on the validation prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [teacher for teacher in TEACHERS if any(run.teacher == teacher for run in outcome.results)]
    for teacher in found:
        plots.curves(outcome, teacher, folder / f"curves-{teacher}.png")
    plots.gates(outcome, folder / "gates.png")
    _csv(outcome, found, folder / "areas.csv")
    sections = "".join(_teacher(outcome, teacher, checks.get(teacher, {})) for teacher in reversed(found))
    text = TEXT.format(
        state=_state(outcome, missing),
        low=LOW,
        high=HIGH,
        claims=_claims(outcome.claims),
        added=_claims(outcome.added_claims),
        teachers=sections,
        overoptimised=_overoptimised(outcome, found),
        gates=_gates(outcome, found),
    )
    (folder / "README.md").write_text(text)


def _state(outcome: Outcome, missing: int) -> str:
    hours = sum(run.seconds for run in outcome.results) / 3600
    done = f"{len(outcome.results)} runs took {hours:.1f} core-hours."
    for teacher in TEACHERS:
        kinds = {run.weights for run in outcome.results if run.teacher == teacher}
        if len(kinds) > 1:
            done += f" The {teacher_name(teacher)} was trained {len(kinds)} times, on different machines."
    return f"{done} **{missing} of the planned runs are missing.**" if missing else done


def _claims(of: Callable[[str], Sequence[Claim]]) -> str:
    rows = [
        [claim.letter, f"{claim.ours} beats {claim.theirs}", teacher, *_verdict(claim)]
        for teacher in (HETEROGENEOUS, GOOD)
        for claim in of(teacher)
    ]
    if not rows:
        return f"None has the results of all {len(SEEDS)} seeds yet.\n"
    return _markdown(["", "claim", "teacher", "difference of areas", "p", "verdict"], rows)


def _verdict(claim: Claim) -> list[str]:
    return [str(claim.difference), f"{claim.p_value:.3f}", f"**{claim.verdict}**"]


def _teacher(outcome: Outcome, teacher: str, check: Mapping[str, float]) -> str:
    """One teacher's tables and curves."""
    rows = [_reference(outcome, name) for name in (TRUTH, AUTOENCODER, teacher_name(teacher))]
    rows += [row for method in METHODS if (row := _method(outcome, teacher, method))]
    checked = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in check.items())
    head = ["", "seeds", *(f"area, {stratum}" for stratum in (BOTH, *STRATA)), "best: right", "trained", "held-out"]
    return (
        f"## With the {teacher_name(teacher)}\n\n"
        f"The teacher on the validation prompts: {checked or 'not checked'}. The area of a "
        "reference is that of its one point. The last three columns are of the stopping time with the most right "
        f"pictures, among those with a diversity of {LOW:g} or more; mean over seeds and step counts. * marks an "
        "error of one seed, which is that of the prompts alone.\n\n"
        f"{_markdown(head, rows)}\n![judge against diversity](curves-{teacher}.png)\n\n"
    )


def _reference(outcome: Outcome, name: str) -> list[str]:
    figures = outcome.references[name]
    areas = [f"{outcome.area_of(figures, stratum):.3f}" for stratum in (BOTH, *STRATA)]
    return [
        f"*{name}*",
        "",
        *areas,
        *(f"{np.mean(getattr(figures, of)):.3f}" for of in SHOWN),
    ]


def _method(outcome: Outcome, teacher: str, method: str) -> list[str]:
    found = [outcome.estimate(teacher, method, stratum) for stratum in (BOTH, *STRATA)]
    if any(one is None for one in found):
        return []
    seeds = outcome.seeds(teacher, method)
    of_prompts = "*" if len(seeds) == 1 else ""
    areas = [f"{one.mean:.3f} ± {one.error:.3f}{of_prompts}" for one in found if one]
    chosen = [best for seed in seeds for nfe in NFES if (best := _best(outcome, teacher, method, seed, nfe))]
    means = [f"{np.mean([np.mean(getattr(one, of)) for one in chosen]):.3f}" if chosen else "-" for of in SHOWN]
    return [method, str(len(seeds)), *areas, *means]


def _best(outcome: Outcome, teacher: str, method: str, seed: int, nfe: int) -> Figures | None:
    """The figures at the stopping time that the judge likes best, of those that are varied enough."""
    stops = outcome.stops(teacher, method, seed, nfe)
    share, right = outcome.points(stops, BOTH)
    varied = [i for i in range(len(stops)) if share[i] >= LOW]
    return stops[max(varied, key=lambda i: float(right[i]))].figures if varied else None


def _overoptimised(outcome: Outcome, found: Sequence[str]) -> str:
    """Whether reward only was trained for so long that the judge got worse: its best and its last stopping time."""
    rows = []
    for run in outcome.results:
        if run.method == REWARD_ONLY and run.teacher in found:
            for nfe in NFES:
                right = [float(np.mean(stop.figures.right)) for stop in run.stops if stop.nfe == nfe]
                at = int(np.argmax(right))
                steps = [stop.step for stop in run.stops if stop.nfe == nfe]
                cells = [f"{right[at]:.3f}", str(steps[at]), f"{right[-1]:.3f}", str(steps[-1])]
                rows.append([run.teacher, run.strength, str(run.seed), str(nfe), *cells])
    head = ["teacher", "strength", "seed", "steps", "best: right", "after", "last: right", "after"]
    known = [
        [f"*{name}*", "", "", "", f"{np.mean(outcome.references[name].right):.3f}", "", "", ""]
        for name in (TRUTH, AUTOENCODER, *map(teacher_name, found))
    ]
    return _markdown(head, [*known, *rows]) if rows else "No run of it yet."


def _gates(outcome: Outcome, found: Sequence[str]) -> str:
    rows = []
    for teacher in found:
        for method in METHODS:
            noted = [
                stop.gate
                for run in outcome.results
                if (run.teacher, run.method) == (teacher, method)
                for stop in run.stops
                if stop.nfe == NFES[0] and stop.gate
            ]
            values = [
                [gate[stratum][name] for gate in noted if stratum in gate]
                for name in ("weight", "gap")
                for stratum in STRATA
            ]
            if all(values):
                rows.append([teacher, method, *(f"{np.mean(of):+.2f}" for of in values)])
    head = ["teacher", "method", *(f"{name}, {s}" for name in ("weight", "teacher ahead") for s in STRATA)]
    return _markdown(head, rows) if rows else "No run with a gate yet."


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _csv(outcome: Outcome, found: Sequence[str], path: Path) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["teacher", "method", "seed", *(f"area, {stratum}" for stratum in (BOTH, *STRATA))])
        for name, figures in outcome.references.items():
            out.writerow([name, "", "", *(f"{outcome.area_of(figures, s):.5f}" for s in (BOTH, *STRATA))])
        for teacher in found:
            for method in METHODS:
                by_seed = [outcome.by_seed(teacher, method, stratum) for stratum in (BOTH, *STRATA)]
                for seed in by_seed[0]:
                    out.writerow([teacher, method, seed, *(f"{areas[seed]:.5f}" for areas in by_seed)])
