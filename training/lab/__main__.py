"""``python -m training.lab --preset shapes``: train the runs of the comparison and write its report.

Interrupt it at any time; the same command resumes where it stopped. ``--plan`` prints what it would do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from training.endings import LESS_MEMORY, one_sentence
from training.lab.cells import Cell, cells
from training.progress import console, quiet, read_log


def main(
    preset: Annotated[str, typer.Option(help="The comparison: shapes.")] = "shapes",
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/lab"),
    report: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("docs/lab"),
    cell: Annotated[list[str] | None, typer.Option(help="Only runs whose name contains this.")] = None,
    steps: Annotated[int, typer.Option(help="Fewer steps per run, for a trial; 0 takes the plan's.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
    plan: Annotated[bool, typer.Option(help="Print the runs and their expected hours, and stop.")] = False,
) -> None:
    """Train the runs that have no result yet, then write the report from all results."""
    from training.lab.run import RESULT, only, shortened

    quiet()
    if preset != "shapes":
        console.print(f"[red]unknown preset {preset!r}: accepted is shapes[/red]", highlight=False)
        raise typer.Exit(2)
    chosen = only(cells(), cell or [])
    if not chosen:
        console.print(f"[red]no run's name contains {', '.join(cell or [])}: --plan lists them[/red]", highlight=False)
        raise typer.Exit(2)
    if steps:
        chosen = [shortened(one, steps) for one in chosen]
    if plan:
        table = Table("run", "part", "minutes", "done", title="comparison")
        for one in chosen:
            done = "yes" if (out / one.key / RESULT).exists() else ""
            table.add_row(one.key, one.part, f"{one.expected_s / 60:.0f}", done)
        console.print(table)
        console.print(f"{sum(one.expected_s for one in chosen) / 3600:.1f} hours on one core")
        return
    if threads:
        torch.set_num_threads(threads)
    _run(chosen, out, report)


def _run(chosen: list[Cell], out: Path, report: Path) -> None:
    from training.lab.report import write
    from training.lab.run import RESULT, results, run_all

    with one_sentence(
        less_memory=LESS_MEMORY, interrupted="stopped: the same command resumes with the first unfinished run"
    ):
        run_all(chosen, out)
    missing = sum(not (out / one.key / RESULT).exists() for one in cells())
    found = results(out)
    logs = {one.key: read_log(out / one.key / "log.jsonl") for one in found}
    write(found, report, missing, logs)
    console.print(f"the report is {report / 'README.md'}")


if __name__ == "__main__":
    typer.run(main)
