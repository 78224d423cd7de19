"""``python -m training.pretrain --preset shapes``: everything that a RATS run of the starter world starts from.

Interrupt it at any time; the same command goes on where it stopped.
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
STAGES = ("autoencoder", "trained", "heldout", "teacher", "decoder", "failures", "scorers")


def main(
    preset: Annotated[str, typer.Option(help="Which world to train for: shapes.")] = "shapes",
    out: Annotated[Path, typer.Option(help="Where checkpoints and logs lie while it runs.")] = Path("runs/shapes"),
    models: Annotated[Path, typer.Option(help="Where the finished models go.")] = Path("models"),
    setting: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as teacher.steps=20000")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages: " + ", ".join(STAGES))] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train the starter world's autoencoder, scorers and teacher, then its decoder and scorers once more."""
    quiet()
    from training.shapes.preset import ShapesPretraining
    from training.shapes.pretraining import run

    with one_sentence():
        if preset not in PRESETS:
            raise ConfigError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
        chosen = tuple(stage or STAGES)
        for name in chosen:
            if name not in STAGES:
                raise ConfigError(f"unknown stage {name!r}: known are {', '.join(STAGES)}")
        config = with_settings(ShapesPretraining(), setting or [])
        if dry_run:
            print(to_json(config))
            return
        claim(out, to_json(config))
        if threads:
            torch.set_num_threads(threads)
        table = Table("figure", "value", title="starter models")
        for name, value in run(config, out, models, chosen).items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
