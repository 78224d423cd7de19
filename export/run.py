"""``python -m export.run --student models/shapes --to onnx``: compile a student, and verify that its pictures agree."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from student.bundle import BundleError, read_student
from student.files import verify_files

if TYPE_CHECKING:
    from export.compile import Outcome
    from export.request import Request
    from export.targets import Target

MODELS = Path(__file__).resolve().parents[1] / "models"


def run(
    student: Annotated[Path, typer.Option(help="Folder of the student bundle.")],
    to: Annotated[str, typer.Option(help="The target: onnx, openvino, tensorrt or tensorrt_rtx.")],
    form: Annotated[
        str, typer.Option(help="staged (the loop over the steps stays outside), or fused (all steps in one graph).")
    ] = "staged",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or fp8; by default the target's first.")] = "",
    scorers: Annotated[
        Path | None, typer.Option(help="Folder of the scorers; by default STUDENT-scorers, then those in models/.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts for the verification, one per line; by default the bundle's, else the starter's."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="A size beside the student's own, WIDTHxHEIGHT in pixels; repeatable."),
    ] = None,
    frames: Annotated[
        str, typer.Option(help="Lengths of videos beside the student's own, in frames at every size: 17,33.")
    ] = "",
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads for the verification.")] = 1,
    force: Annotated[bool, typer.Option(help="Compile again even what is up to date.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print what would be built, with disk and memory, and stop.")] = False,
    batches: Annotated[str, typer.Option(help="TensorRT: last batch size of each profile.")] = "1,2,4,8",
    memory_gb: Annotated[float, typer.Option(min=0.1, help="TensorRT: most memory that a build may use.")] = 64.0,
    portable: Annotated[bool, typer.Option(help="TensorRT: run on other GPUs too, more slowly.")] = False,
    batch_invariant: Annotated[
        bool, typer.Option(help="TensorRT: an image never depends on the rest of its batch, at some cost.")
    ] = False,
) -> None:
    """Compile a student into its bundle, with its scorers; nothing that fails its verification is written."""
    from export.errors import ExportError  # the heavy imports wait until the arguments are read

    try:
        from export.request import EngineOptions, Request, read_frames, read_prompts, read_sizes
        from export.select import find_target
        from export.targets import check_request

        target = find_target(to)
        manifest = read_student(student)
        chosen = precision or next(iter(target.precisions))
        check_request(target, form, chosen, manifest.family)
        request = Request(
            bundle=student,
            student=manifest,
            form=form,
            precision=chosen,
            scorers=(scorers,) if scorers else (student.with_name(f"{student.name}-scorers"), *_shipped()),
            threads=threads,
            force=force,
            prompts=read_prompts(student, prompts, chosen),
            sizes=read_sizes(manifest, size or [], form),
            frames=read_frames(manifest, frames, form),
            engine=EngineOptions(_batches(batches), int(memory_gb * 2**30), 4 * 2**30, 3, portable, batch_invariant),
            say=typer.echo,
        )
        (_plan if dry_run else _compile)(request, target)
    except (BundleError, ExportError, OSError) as error:
        typer.echo(f"export: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("export: interrupted; finished stages are kept, and the same command resumes from there", err=True)
        raise typer.Exit(130) from None


def _batches(text: str) -> tuple[int, ...]:
    from export.errors import ExportError

    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 63 for part in numbers):
        raise ExportError(f"batches is {text!r}: accepted are numbers from 1 to 63, separated by commas")
    return tuple(sorted({int(part) for part in numbers}))


def _shipped() -> list[Path]:
    return sorted(MODELS.glob("*-scorers"))


def _compile(request: Request, target: Target) -> None:
    from export.errors import ExportError
    from export.preflight import check_disk, estimates

    if reason := target.refuse(request):
        raise ExportError(reason)
    verify_files(request.bundle, request.student)
    check_disk(
        request.bundle, estimates(request.bundle, request.student, request.form, request.precision, request.buckets)
    )
    from export.card import update_card
    from export.compile import compile_student

    _compile_scorers(request)
    outcome = compile_student(request, target)
    _probe(request, outcome)
    update_card(request.bundle, outcome)
    _summary(outcome)


def _probe(request: Request, outcome: Outcome) -> None:
    """Measure the bundle's golden probe with the new runtime, if it runs here."""
    from export.probe import update_probe
    from rewards.serving import open_reward
    from student.probe import read_probe
    from student.runtimes.load import load
    from student.runtimes.machine import machine_kind
    from student.runtimes.options import Options

    name = outcome.folder.name
    known = read_probe(request.bundle, request.student)
    if request.student.image.frames is not None or not outcome.manifest.parity:
        return
    if not outcome.made and known and machine_kind(name) in known.known.get(name, {}):
        return
    try:
        runtime = load(request.bundle, name, request.threads, Options(open_reward))
    except BundleError as error:  # a CPU has no kernels for what is made for TensorRT to read
        request.say(f"the golden probe is not measured with {name}, which does not run here: {error}")
        return
    update_probe(request.bundle, runtime, request.prompts)


def _compile_scorers(request: Request) -> None:
    from export.errors import ExportError
    from export.scorers import export_scorer, is_compiled, open_scorer
    from rewards.twostage import TwoStage
    from student.runtimes.sizes import own_size

    bundle, student = request.bundle, request.student
    for name, scorer in student.scorers.items():
        if not request.force and is_compiled(bundle, student, name):
            continue
        start, file = time.monotonic(), bundle / scorer.file
        try:
            reward = open_scorer(bundle, student, name, request.scorers)
        except ExportError as error:
            if scorer.reward is None:
                raise
            request.say(f"{error}; pictures are served without it until it is available")
            continue
        if not isinstance(reward, TwoStage):
            request.say(f"the scorer {name!r} ({scorer.reward}) runs in torch, which must be installed to serve it")
            continue
        worst = export_scorer(file, reward, scorer.source_sha256, (own_size(student), *request.sizes), scorer.std)
        size_mb, took_s = file.stat().st_size / 1e6, time.monotonic() - start
        request.say(f"{file.name}: {size_mb:.1f} MB in {took_s:.0f} s, at most {worst:.1e} from torch")


def _summary(outcome: Outcome) -> None:
    """Print what was made, how long it took, and how close it is to torch."""
    if not outcome.made:
        typer.echo(f"{outcome.folder} is up to date")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=outcome.manifest.name)
    for column in ("stage", "MB", "s", "relative error", "worst"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in outcome.made:
        error = outcome.manifest.stage_errors.get(row.name)
        figures = (f"{error.relative:.1e}", f"{error.max_abs:.1e}") if error else ("", "")
        table.add_row(row.name, f"{row.bytes / 1e6:.1f}", "reused" if row.reused else f"{row.seconds:.0f}", *figures)
    for steps, parity in outcome.manifest.parity.items():
        worst = max(parity.max_abs.values())
        table.add_row(f"pictures, {steps} steps", "", "", f"{parity.psnr_db or 0:.0f} dB", f"{worst:.1e}")
        for name, change in parity.reward.items():
            table.add_row(f"  reward {name}", "", "", f"{change.mean:+.4f}", f"± {change.error:.4f}")
    Console().print(table)
    for name, rows in outcome.manifest.buckets.items():
        worst = max(value for parity in rows.values() for value in parity.max_abs.values())
        typer.echo(f"{name}: at most {worst:.1e} from torch")
    for stage, reason in outcome.manifest.in_torch.items():
        typer.echo(f"{stage} stays in torch, which must be installed to serve it: {reason}")
    if not outcome.manifest.parity:
        typer.echo("not verified: there is no GPU here; serving refuses it until export.run verifies it on its machine")


def _plan(request: Request, target: Target) -> None:
    """Print what a run would build."""
    from export.keys import finished
    from export.preflight import estimates, memory_bytes

    rows = estimates(request.bundle, request.student, request.form, request.precision, request.buckets)
    there = finished(request)
    typer.echo(f"{request.bundle}/runtimes/{target.folder(request)} would be built:")
    for row in rows:
        kept = ", its graph exists" if row.stage in there else ""
        typer.echo(f"  {row.stage}: {row.parameters / 1e6:.1f} M parameters, about {row.disk_bytes / 1e6:.1f} MB{kept}")
    disk_mb = sum(row.disk_bytes for row in rows) / 1e6
    typer.echo(f"about {disk_mb:.1f} MB of disk and {memory_bytes(rows) / 2**30:.2f} GiB of memory")
    if reason := target.refuse(request):
        typer.echo(f"but not on this machine: {reason}")


if __name__ == "__main__":
    typer.run(run)
