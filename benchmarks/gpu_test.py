"""``make gpu-test``: every way to run a student on this machine's NVIDIA GPU, proven and timed, in one table.

What is missing is one sentence each. It needs no input, writes into a folder of its own, and ends by itself: a part
that takes longer than its share of ten minutes is stopped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from student.runtimes.machine import find_gpu

ROOT = Path(__file__).resolve().parents[1]
STARTER = ROOT / "models" / "shapes"
LIMIT_S = 85.0  # seven parts in ten minutes
BATCHES = (1, 4, 8)
REPEATS = 30


@dataclass(frozen=True)
class Part:
    """One way to run a student: the libraries that it needs, and how its runtime is made."""

    name: str
    needs: tuple[str, ...]
    target: str = ""
    precision: str = ""


PARTS = (
    Part("torch eager", ("torch", "diffusers")),
    Part("torch eager, bf16", ("torch", "diffusers"), precision="bf16"),
    Part("torch.compile, CUDA graphs", ("torch", "diffusers")),
    Part("onnx", ("onnxruntime",), "onnx", "fp32"),
    Part("onnx, TensorRT provider", ("onnxruntime",), "onnx", "fp32"),
    Part("tensorrt", ("tensorrt",), "tensorrt", "bf16"),
    Part("tensorrt_rtx", ("tensorrt_rtx",), "tensorrt_rtx", "bf16"),
)


@dataclass(frozen=True)
class Result:
    """``ms`` by batch size; or why there are none."""

    why_not: str = ""
    ms: tuple[float, ...] = ()
    worst_pixel: float = 0.0
    psnr_db: float = 0.0


def main() -> None:
    """Run every part in a process of its own and print the table; the status is 1 if a part that could run failed."""
    if len(sys.argv) > 1:
        print(json.dumps(asdict(_measure(PARTS[int(sys.argv[1])], Path(sys.argv[2])))))
        return
    gpu, reason = find_gpu()
    console = Console(width=140)
    if gpu is None:
        console.print(f"nothing can be tested on a GPU: {reason}.")
        for part in PARTS:
            console.print(f"{part.name}: {_missing(part) or 'installed, and not tested without a GPU'}.")
        return
    title = f"{gpu.name}, compute capability {gpu.compute_capability}, CUDA {gpu.cuda}"
    results = [_run(number) for number in range(len(PARTS))]
    console.print(_table(title, results))
    for part, result in zip(PARTS, results, strict=True):
        if result.why_not:
            console.print(f"{part.name}: {result.why_not}.")
    sys.exit(any(result.why_not.startswith("failed") for result in results))


def _missing(part: Part) -> str:
    return next((f"{name} is not installed" for name in part.needs if importlib.util.find_spec(name) is None), "")


def _run(number: int) -> Result:
    """One part in a process of its own: a library that takes the process down takes one row with it."""
    if why_not := _missing(PARTS[number]):
        return Result(why_not)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "benchmarks.gpu_test", str(number), work]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return Result(f"failed: it was stopped after {LIMIT_S:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Result(f"failed with status {done.returncode}: {said}")
    row = json.loads(lines[-1])
    return Result(**{**row, "ms": tuple(row["ms"])})


def _measure(part: Part, work: Path) -> Result:
    import torch

    from export.verify import PROMPTS, difference, psnr_db
    from student.bundle import BundleError, read_student
    from student.pipeline import open_pipeline, reproduce

    if part.name.startswith("torch") and not torch.cuda.is_available():
        return Result(f"torch {torch.__version__} is built without CUDA")
    bundle = Path(shutil.copytree(STARTER, work / "student"))
    student = read_student(bundle)
    steps = min(student.steps)
    try:
        draw = _drawer(part, bundle)
    except (BundleError, RuntimeError) as error:
        return Result(" ".join(str(error).split()))
    theirs = reproduce(open_pipeline(bundle), student, PROMPTS, range(len(PROMPTS)), steps)
    ours = draw(list(PROMPTS), list(range(len(PROMPTS))), steps)
    ms = []
    for batch in BATCHES:
        prompts, seeds = [PROMPTS[0]] * batch, list(range(batch))
        draw(prompts, seeds, steps)
        start = time.perf_counter()
        for _ in range(REPEATS):
            draw(prompts, seeds, steps)
        ms.append((time.perf_counter() - start) / REPEATS * 1e3)
    return Result(ms=tuple(ms), worst_pixel=difference(ours, theirs), psnr_db=psnr_db([(ours, theirs)]))


def _drawer(part: Part, bundle: Path):  # type: ignore[no-untyped-def]
    """How this part draws: (prompts, seeds, steps) -> images on the CPU."""
    if not part.target:
        return _recorded(bundle) if "graphs" in part.name else _torch_drawer(part, bundle)
    from student.bundle import BundleError, read_student
    from student.runtimes.load import load

    if part.target == "onnx":
        import onnxruntime as ort

        wanted = "TensorrtExecutionProvider" if "TensorRT" in part.name else "CUDAExecutionProvider"
        if wanted not in ort.get_available_providers():
            raise BundleError(f"onnxruntime is installed without its {wanted} (onnxruntime-gpu)")
    done = subprocess.run(
        [sys.executable, "-m", "export.run", "--student", str(bundle), "--to", part.target]
        + ["--precision", part.precision],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise BundleError((done.stderr.strip().splitlines() or ["export.run said nothing"])[-1])
    if part.target == "onnx":
        from student.runtimes.onnx import STAGED_FP32, onnx_runtime

        return onnx_runtime(bundle, read_student(bundle), 1, STAGED_FP32, tensorrt="TensorRT" in part.name).draw
    return load(bundle, part.target).draw


def _torch_drawer(part: Part, bundle: Path):  # type: ignore[no-untyped-def]
    import numpy as np

    from student.runtimes import placement
    from student.runtimes.load import load

    if part.precision == "bf16":
        placement.SMALL = 0  # the starter student would run in float32; this process draws nothing else
    runtime = load(bundle, "torch")

    def draw(prompts, seeds, steps):  # type: ignore[no-untyped-def]
        parts = [slice(b, b + runtime.max_batch) for b in range(0, len(prompts), runtime.max_batch)]
        return np.concatenate([runtime.draw(prompts[part], seeds[part], steps) for part in parts])

    return draw


def _recorded(bundle: Path):  # type: ignore[no-untyped-def]
    """The runtime's model without its search for the largest batch, which would compile every batch size."""
    import torch

    from student.bundle import read_student
    from student.families.find import family_of_student
    from student.noise import noise
    from student.pipeline import open_pipeline
    from student.runtimes.placement import Placement
    from student.runtimes.torch import TorchModel, move_parts
    from student.tokens import PromptTokens

    student, on_gpu = read_student(bundle), Placement("cuda", "float32")
    family = family_of_student(open_pipeline(bundle), student)
    move_parts(family, on_gpu)
    model, tokens = TorchModel(family, on_gpu, "graphs"), PromptTokens(bundle, student.max_tokens, student.family)

    def draw(prompts, seeds, steps):  # type: ignore[no-untyped-def]
        ids_BL = [torch.from_numpy(rows) for rows in tokens.encode(prompts)]
        x = torch.from_numpy(noise(seeds, student.latents.shape))
        return model.draw(ids_BL, x, student.sigmas[steps]).cpu().numpy()

    return draw


def _table(title: str, results: list[Result]) -> Table:
    table = Table(title=title)
    for column in ("runtime", *(f"ms, batch {batch}" for batch in BATCHES), "worst pixel", "PSNR"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    for part, result in zip(PARTS, results, strict=True):
        if result.ms:
            parity = (f"{result.worst_pixel:.1e}", f"{result.psnr_db:.0f} dB")
            table.add_row(part.name, *(f"{value:.2f}" for value in result.ms), *parity)
    return table


if __name__ == "__main__":
    main()
