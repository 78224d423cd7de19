"""``python -m training.run --preset shapes --out models/NAME``: a RATS run, from a teacher to a student bundle.

Interrupt it at any time; the same command resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from training.config import changed, to_json, with_settings
from training.endings import LESS_MEMORY, one_sentence
from training.experiment.presets import preset as find_preset
from training.experiment.room import require_room
from training.hub import push
from training.processes import Processes, process_group
from training.progress import console, quiet
from training.rats.config import RatsConfig
from training.rundir import FINISHED, claim_together, refuse_others
from training.termination import stopped_at_once

STOPPED = "stopped: the same command goes on from here, or from the last checkpoint where there is one"


def resolved(preset: str, settings: Sequence[str]) -> RatsConfig:
    """A preset with settings, and with what follows from them where nothing else is said.

    Raises:
        ConfigError: as ``with_settings``.
    """
    config = with_settings(find_preset(preset), settings)
    said = {setting.partition("=")[0].strip() for setting in settings}
    implied: dict[str, Any] = {}
    if config.method == "tune":  # what it is measured against is itself, as it was
        nfe = max(config.student.nfe)
        implied = {"teacher.nfe": nfe, "teacher.reference_nfe": nfe, "teacher.guidance": 1.0, "teacher.guided_steps": 0}
    elif config.student.init:  # an average of another model's student is no slow teacher
        implied = {"teacher.guided_steps": config.steps}
    return changed(config, {key: value for key, value in implied.items() if key not in said})


def main(
    out: Annotated[Path, typer.Option(help="Folder for the student; an unfinished run there is resumed.")],
    preset: Annotated[str, typer.Option(help="The preset to start from, such as shapes or sd35-medium.")] = "shapes",
    model: Annotated[
        str | None,
        typer.Option("--model", "--teacher", help="The teacher: folder or hub id of a pipeline."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="The student's initial weights, if not its teacher's: a pipeline, a student, or a LoRA."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune a model that already generates in few steps; there is no teacher.")
    ] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as optim.lr=1e-4")] = None,
    push_to: Annotated[
        str | None,
        typer.Option(help="Upload card, grid and adapter (or the pipeline) to this hub id."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a few-step student with RATS, evaluate it, and write its bundle."""
    quiet()
    with one_sentence(less_memory=LESS_MEMORY), stopped_at_once(STOPPED), process_group():
        own = {"model": model, "student.init": init, "method": "tune" if tune else None}
        config = resolved(preset, [*(setting or []), *(f"{key}={value}" for key, value in own.items() if value)])
        if dry_run:
            print(to_json(config))
            return
        require_room(preset, config)
        processes = Processes()
        if processes.is_first:
            refuse_others(out / "run", config, out)
        if (out / "run" / FINISHED).exists():
            if processes.is_first:
                console.print(f"{out} already holds the finished student of this run")
                _push(out, push_to)
            return
        if threads:
            torch.set_num_threads(threads)
        from training.experiment.run import run
        from training.experiment.setup import prepare

        setup = prepare(config)  # before anything is written: a typo leaves nothing behind
        claim_together(processes, out / "run", config, out)
        run(setup, out)
        if processes.is_first:
            _push(out, push_to)


def _push(out: Path, repository: str | None) -> None:
    if repository is not None:
        console.print(push(out, repository), highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
