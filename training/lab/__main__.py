"""``python -m training.lab``: make the two teachers, train the runs of the experiment, and write its report.

Interrupt it at any time; the same command resumes where it stopped. A second process with the same folder takes other
runs. ``--plan`` prints what it would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from training.endings import LESS_MEMORY, one_sentence
from training.progress import console, quiet

if TYPE_CHECKING:
    from training.lab.cells import Cell
    from training.lab.published import Published
    from training.lab.stops import Stop

PARTS = ("all", "teachers", "check", "repeat", "report")
RESULTS = Path("docs/lab/results")


def main(
    part: Annotated[str, typer.Argument(help="One of " + ", ".join(PARTS))] = "all",
    out: Annotated[Path, typer.Option(help="Folder of the teachers and runs.")] = Path("runs/lab"),
    report: Annotated[
        Path | None, typer.Option(help=f"Folder for the report; by default {RESULTS}, of a trial report/ in --out.")
    ] = None,
    known: Annotated[Path, typer.Option(help="A report whose runs are taken over and not made again.")] = RESULTS,
    cell: Annotated[list[str] | None, typer.Option(help="Only runs whose name contains this.")] = None,
    steps: Annotated[int, typer.Option(help="Fewer steps per run, for a trial; 0 takes the plan's.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
    plan: Annotated[bool, typer.Option(help="Print the runs and their expected hours, and stop.")] = False,
) -> None:
    """Make the teachers, train the runs that have no result yet, and write the report from all results."""
    from training.lab.cells import cells
    from training.lab.run import TEACHERS, only, shortened

    quiet()
    if part not in PARTS:
        console.print(f"[red]unknown part {part!r}: accepted are {', '.join(PARTS)}[/red]", highlight=False)
        raise typer.Exit(2)
    chosen = only(cells(out / TEACHERS), cell or [])
    if not chosen:
        console.print(f"[red]no run's name contains {', '.join(cell or [])}: --plan lists them[/red]", highlight=False)
        raise typer.Exit(2)
    if steps:
        chosen = [shortened(one, steps) for one in chosen]
    if plan:
        _print_plan(chosen, out)
        return
    if threads:
        torch.set_num_threads(threads)
    with one_sentence(
        less_memory=LESS_MEMORY, interrupted="stopped: the same command resumes with the first unfinished run"
    ):
        _work(part, chosen, out, report or (out / "report" if steps else RESULTS), known, steps)


def _work(part: str, chosen: Sequence[Cell], out: Path, report: Path, known: Path, steps: int) -> None:
    from training.lab import published
    from training.lab.cells import cells
    from training.lab.cells import check as check_cell
    from training.lab.run import TEACHERS, check, make_teachers, run_all, shortened
    from training.lab.teachers import TeachersConfig

    before = published.read(known)
    if part in ("all", "report"):
        plan = cells(out / TEACHERS)
        taken = published.take_over(before, [shortened(one, steps) for one in plan] if steps else plan, out)
        console.print(f"{taken} runs of {known} are taken over")
    if part != "report":
        config = TeachersConfig()
        _print_teachers(make_teachers(out, config.shortened(steps) if steps else config))
    if part == "check":
        cell = check_cell(out / TEACHERS)
        _print_check(check(shortened(cell, steps) if steps else cell, out))
    if part == "repeat":
        _repeat(chosen, out, before)
    if part == "all":
        left = run_all(chosen, out, steps)
        if left:
            console.print(f"{left} runs are being made by other processes")
    if part in ("all", "report"):
        _report(out, report, before)


def _report(out: Path, report: Path, before: Published) -> None:
    import json

    from training.lab import published, references
    from training.lab.cells import cells
    from training.lab.outcome import Outcome
    from training.lab.report import write
    from training.lab.run import TEACHERS, complete, results
    from training.lab.teachers import FIGURES

    plan, found = cells(out / TEACHERS), results(out)
    if not found:
        console.print(f"{out} has no results yet: nothing to report")
        return
    figures, measured = out / TEACHERS / FIGURES, out / references.FILE
    teachers = json.loads(figures.read_text()) if figures.exists() else before.teachers
    prompts, known = references.read(measured) if measured.exists() else (before.prompts, before.references)
    missing = len({one.key for one in plan} - {one.key for one in found})
    write(Outcome(complete(found, plan), prompts, known), report, missing, teachers)
    settings = published.settings_of_all(out, found)
    published.write(published.Published(prompts, known, teachers, found, settings), report)
    console.print(f"the report is {report / 'README.md'}")


def _repeat(chosen: Sequence[Cell], out: Path, before: Published) -> None:
    """Make published runs again, in a folder of their own, and say how far they are from what was published."""
    from training.lab.published import difference
    from training.lab.run import again

    table = Table("run", "figure", "published", "repeated", "largest difference at a prompt", title="repeated runs")
    for cell in chosen:
        theirs = before.result_of(cell)
        if theirs is None:
            console.print(f"{cell.key} has no published result with its present configuration", highlight=False)
            continue
        for name, (ours, published, largest) in difference(again(cell, out / "repeat"), theirs).items():
            table.add_row(cell.key, name, f"{published:.4f}", f"{ours:.4f}", f"{largest:.6f}")
    console.print(table)


def _print_plan(chosen: Sequence[Cell], out: Path) -> None:
    from training.lab.run import RESULT

    table = Table("run", "part", "minutes", "done", title="experiment")
    parts: dict[str, float] = {}
    for one in chosen:
        done = "yes" if (out / one.key / RESULT).exists() else ""
        table.add_row(one.key, one.part, f"{one.expected_s / 60:.1f}", done)
        parts[one.part] = parts.get(one.part, 0.0) + one.expected_s / 3600
    console.print(table)
    by_part = ", ".join(f"{name} {hours:.1f}" for name, hours in parts.items())
    console.print(f"{len(chosen)} runs, {sum(parts.values()):.1f} hours on one core ({by_part})")


def _print_check(stops: Sequence[Stop]) -> None:
    table = Table("training steps", "steps", "right (judge)", "trained", "held-out", "diversity", title="reward only")
    for stop in stops:
        figures = stop.figures
        parts = (figures.right, figures.trained, figures.heldout, figures.diversity)
        table.add_row(str(stop.step), str(stop.nfe), *(f"{sum(part) / len(part):.3f}" for part in parts))
    console.print(table)


def _print_teachers(figures: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(figures.values())))
    table = Table("teacher", *(name.replace("_", " ") for name in names), title="teachers, by the exact judge")
    for teacher, row in figures.items():
        table.add_row(teacher, *(f"{row[name]:.3f}" for name in names))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
