"""``python -m export.run --student models/shapes --to onnx``: compile a student, and prove that it draws the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from student.bundle import BundleError, read_student, verify_files

FORMS = ("fused", "staged")
MODELS = Path(__file__).resolve().parents[1] / "models"


def run(
    student: Annotated[Path, typer.Option(help="Folder of the student bundle.")],
    to: Annotated[str, typer.Option(help="What to compile it to: onnx.")],
    scorers: Annotated[
        Path | None, typer.Option(help="Folder that holds the scorers; else STUDENT-scorers, then those in models/.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="fused (all steps in one graph), or staged (the loop over the steps stays outside).")
    ] = "fused",
    threads: Annotated[int, typer.Option(min=1, help="Threads that the proof may use.")] = 1,
    force: Annotated[bool, typer.Option(help="Compile again what is already there.")] = False,
) -> None:
    """Compile a student into its bundle, with its scorers; nothing that fails its proof is written."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        if to not in TARGETS:
            raise ExportError(f"cannot compile to {to!r}: accepted is {', '.join(TARGETS)}")
        if form not in FORMS:
            raise ExportError(f"form is {form!r}: accepted is {', '.join(FORMS)}")
        TARGETS[to](student, scorers, form, threads, force)
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"export: {error}", err=True)
        raise typer.Exit(1) from None


def _to_onnx(bundle: Path, scorers: Path | None, form: str, threads: int, force: bool) -> None:
    student = read_student(bundle)
    verify_files(bundle, student)
    from export import to_onnx
    from export.scorers import export_scorer, find_scorer, is_compiled

    folders = [scorers] if scorers else [bundle.with_name(f"{bundle.name}-scorers"), *sorted(MODELS.glob("*-scorers"))]
    for name in student.scorers:
        if force or not is_compiled(bundle, student, name):
            start = time.monotonic()
            worst = export_scorer(bundle, student, name, find_scorer(student, name, folders))
            _say(bundle / student.scorers[name].file, start, worst)
    start = time.monotonic()
    if not force and to_onnx.is_compiled(bundle, student, form):
        typer.echo(f"{to_onnx.folder(bundle, form)} is up to date")
        return
    for file, worst in to_onnx.export_student(bundle, student, threads, form).items():
        _say(file, start, worst)


def _say(file: Path, start: float, worst: float) -> None:
    size_mb, took_s = file.stat().st_size / 1e6, time.monotonic() - start
    typer.echo(f"{file}: {size_mb:.1f} MB in {took_s:.0f} s, {worst:.1e} from torch at most")


TARGETS: dict[str, Callable[[Path, Path | None, str, int, bool], None]] = {"onnx": _to_onnx}

if __name__ == "__main__":
    typer.run(run)
