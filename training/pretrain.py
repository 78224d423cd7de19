"""``python -m training.pretrain --preset shapes``: trains the models that a RATS run of the starter world starts from.

Interrupt it at any time; the same command resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from training.config import ConfigError, to_json, with_settings
from training.endings import one_sentence
from training.progress import console, quiet
from training.rundir import claim

PRESETS = ("shapes",)
STAGES = ("autoencoder", "trained", "heldout", "teacher", "decoder", "failures", "scorers", "reader")


def main(
    preset: Annotated[str, typer.Option(help="The preset: shapes.")] = "shapes",
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs while it runs.")] = Path("runs/shapes"),
    models: Annotated[Path, typer.Option(help="Folder for the finished models.")] = Path("models"),
    setting: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as teacher.steps=20000")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages: " + ", ".join(STAGES))] = None,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train the starter world's autoencoder, scorers and teacher, then refine its decoder and scorers."""
    quiet()
    from training.shapes.preset import ShapesPretraining
    from training.shapes.pretraining import run

    with one_sentence():
        if preset not in PRESETS:
            raise ConfigError(f"unknown preset {preset!r}: accepted are {', '.join(PRESETS)}")
        chosen = tuple(stage or STAGES)
        for name in chosen:
            if name not in STAGES:
                raise ConfigError(f"unknown stage {name!r}: accepted are {', '.join(STAGES)}")
        config = with_settings(ShapesPretraining(), setting or [])
        if dry_run:
            print(to_json(config))
            return
        claim(out, config)
        if threads:
            torch.set_num_threads(threads)
        table = Table("figure", "value", title="starter models")
        for name, value in run(config, out, models, chosen).items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
