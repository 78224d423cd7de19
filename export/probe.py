"""``python -m export.probe --student models/shapes``: measure a student's golden probe on this machine.

The pairs of a bundle do not change as long as its student does not; another machine or another runtime adds its results
to ``probe.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError
from student.probe import Probe, choose_pairs, measure, read_probe, write_probe
from student.runtimes.machine import machine_kind
from student.runtimes.runtime import Runtime


def update_probe(bundle: Path, runtime: Runtime, prompts: Sequence[str]) -> Probe:
    """Measure the probe with a loaded runtime, and write the results for this kind of machine into the bundle.

    Earlier results of the same runtime on the same kind of machine are replaced.
    """
    student = runtime.student
    probe = read_probe(bundle, student) or Probe(student.fingerprint(), choose_pairs(student, prompts))
    here = {**probe.known.get(runtime.name, {}), machine_kind(runtime.name): measure(runtime, probe.pairs)}
    probe = replace(probe, known={**probe.known, runtime.name: here})
    write_probe(bundle, probe)
    return probe


def run(
    student: Annotated[Path, typer.Option(help="Folder of the student bundle.")],
    runtime: Annotated[str, typer.Option(help="The runtime to use: see FEWSTEP_RUNTIME.")] = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts of a new probe, one per line; by default the bundle's, else the starter's."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
) -> None:
    """Generate and score the bundle's golden probe, and write its results on this kind of machine into the bundle."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        from export.request import read_prompts
        from rewards.serving import open_reward
        from student.runtimes.load import load
        from student.runtimes.options import Options

        loaded = load(student, runtime, threads, Options(open_reward))
        probe = update_probe(student, loaded, read_prompts(student, prompts, ""))
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"probe: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{loaded.name}, {machine_kind(loaded.name)}: {len(probe.pairs)} pictures")


if __name__ == "__main__":
    typer.run(run)
