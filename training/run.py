"""``python -m training.run --preset shapes --out models/NAME``: a RATS run, from a teacher to a student bundle.

Interrupt it at any time; the same command resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from training.config import to_json, with_settings
from training.endings import LESS_MEMORY, one_sentence
from training.processes import Processes, process_group
from training.progress import console, quiet
from training.rats.presets import preset as find_preset
from training.rundir import FINISHED, claim_together, refuse_others


def main(
    out: Annotated[Path, typer.Option(help="Folder for the student; an unfinished run there is resumed.")],
    preset: Annotated[str, typer.Option(help="The preset to start from, such as shapes or sd35-medium.")] = "shapes",
    model: Annotated[
        str | None, typer.Option(help="The teacher: folder or hub id of a FLUX.1, Stable Diffusion 3 or Wan pipeline.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as optim.lr=1e-4")] = None,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a few-step student with RATS, evaluate it, and write its bundle."""
    quiet()
    with one_sentence(less_memory=LESS_MEMORY), process_group():
        config = with_settings(find_preset(preset), [*(setting or []), *([f"model={model}"] if model else [])])
        if dry_run:
            print(to_json(config))
            return
        processes = Processes()
        if processes.is_first:
            refuse_others(out / "run", to_json(config), out)
        if (out / "run" / FINISHED).exists():
            if processes.is_first:
                console.print(f"{out} already holds the finished student of this run")
            return
        if threads:
            torch.set_num_threads(threads)
        from training.rats.experiment import run
        from training.rats.setup import prepare

        setup = prepare(config)  # before anything is written: a typo leaves nothing behind
        claim_together(processes, out / "run", to_json(config), out)
        run(setup, out)


if __name__ == "__main__":
    typer.run(main)
