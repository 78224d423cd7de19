"""``python -m benchmarks.runtimes``: every way to run a student, side by side in one run.

Two models: the starter student whole (ids to pictures), and one step of a DiT of 18 M parameters and 256 tokens. All
contenders of a model take turns, so that a busy moment falls on each alike; the figure is the median. Ratios are to
torch eager in float32; the share is of the machine's own float32 matrix product, measured in the same run. What the
student's bundle does not hold yet is exported into a copy, with its proof; what fails it does not take part.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from student.runtimes.machine import has_amx

STARTER = Path(__file__).resolve().parents[1] / "models" / "shapes"
BATCHES = (1, 4, 8)
MATRIX = 1024
# Target, form and precision of what takes part; what a bundle holds besides does too.
RUNTIMES = (
    ("onnx", "fused", "fp32"),
    ("onnx", "staged", "fp32"),
    ("onnx", "staged", "int8"),
    ("openvino", "fused", "fp32"),
    ("openvino", "fused", "bf16"),
    ("openvino", "staged", "fp32"),
    ("openvino", "staged", "bf16"),
)
PROMPT = "a small red heart above a large blue star on a gray background"
Run = Callable[[], object]
Contenders = dict[str, Callable[[int], Run]]


class Medium(nn.Module):
    """One step of a DiT: 6 layers, 384 wide, 17.8 M parameters, 16 x 16 tokens of a 4 x 32 x 32 latent."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        torch.manual_seed(0)
        self.model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=6, sample_size=32
        )

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """The predicted noise, (B, 4, 32, 32)."""
        answer: Tensor = self.model(x, timestep=timestep, class_labels=label, return_dict=False)[0]
        return answer


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contender.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each contender has one call in each.")] = 7,
    compiled: Annotated[bool, typer.Option(help="torch.compile too, which takes a minute of its own.")] = False,
    student: Annotated[Path, typer.Option(help="The student.")] = STARTER,
) -> None:
    """Print one table for each model."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    peak = peak_flops(repeats)
    tiles = "with AMX" if has_amx() else "without AMX"
    clock = "CPU time" if threads == 1 else "wall time"
    say(f"{cpu_name()} {tiles}, {threads} thread(s), {clock}; float32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(student, Path(folder) / "student"))
        export_all(copy, threads)
        contenders, flops = starter(copy, threads, compiled)
        report(f"{student.name}, whole pictures", contenders, flops, peak, repeats)
        contenders, flops = medium(Path(folder), threads, compiled)
        report("DiT of 18 M parameters, one step", contenders, flops, peak, repeats)


def export_all(bundle: Path, threads: int) -> None:
    """Make every runtime that is not there; says which cannot be had here, and why."""
    from export.compile import compile_student
    from export.errors import ExportError
    from export.request import Request, read_prompts
    from export.select import find_target
    from export.targets import check_request
    from student.bundle import BundleError, read_student

    student = read_student(bundle)
    for name, form, precision in RUNTIMES:
        target, prompts = find_target(name), read_prompts(bundle, None, precision)
        request = Request(bundle, student, form, precision, threads=threads, prompts=prompts, say=lambda text: None)
        start = time.perf_counter()
        try:
            check_request(target, form, precision, student.family)
            with torch.enable_grad():  # the exporter traces as it would in a process of its own
                compile_student(request, target)
            say(f"{name}-{form}-{precision} is there after {time.perf_counter() - start:.0f} s")
        except (ExportError, BundleError) as error:
            say(f"{name}-{form}-{precision} is left out: {error}")


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself, where the system says it."""
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "this CPU")


def say(text: str) -> None:
    """One line, as it is."""
    Console(soft_wrap=True).print(text, highlight=False)


def peak_flops(repeats: int) -> float:
    """FLOP/s of the best of some square products: what this machine can do with these threads."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    seconds = []
    for _ in range(repeats + 3):
        start = _clock()()
        torch.mm(a, b)
        seconds.append(_clock()() - start)
    return 2 * MATRIX**3 / min(seconds)


def starter(bundle: Path, threads: int, compiled: bool) -> tuple[Contenders, float]:
    """The student's runtimes: torch, and every one that its bundle holds (``export.run`` makes them)."""
    from student.bundle import BundleError, read_student
    from student.families.find import family_of_student
    from student.noise import noise
    from student.pipeline import open_pipeline
    from student.runtimes.load import load
    from student.sampler import denoise
    from student.tokens import PromptTokens

    about = read_student(bundle)
    model = family_of_student(open_pipeline(bundle), about)
    ids = [torch.from_numpy(part) for part in PromptTokens(bundle, about.max_tokens, about.family).encode([PROMPT])]
    sigmas = about.sigmas[min(about.steps)]

    def eager(batch: int, step: Callable[..., Any] = model.velocity) -> Run:
        start = torch.from_numpy(noise(range(batch), about.latents.shape))
        rows = [part.expand(batch, -1) for part in ids]

        def run() -> object:
            condition = model.encode_ids(*rows)
            return model.decode(denoise(lambda x, sigma: step(x, sigma, condition), start, sigmas))

        return run

    found: Contenders = {"torch eager": eager}
    if compiled:
        fast = torch.compile(model.velocity)
        found["torch.compile"] = lambda batch: eager(batch, fast)
    for folder in sorted((bundle / "runtimes").glob("[!.]*")):
        try:
            runtime = load(bundle, folder.name, threads)
        except BundleError as error:
            say(f"{folder.name} is left out: {error}")
            continue
        found[folder.name] = lambda batch, runtime=runtime: (
            lambda: runtime.draw([PROMPT] * batch, list(range(batch)), min(about.steps))
        )
    with FlopCounterMode(display=False) as counter:
        eager(1)()
    return found, float(counter.get_total_flops())


def medium(work: Path, threads: int, compiled: bool) -> tuple[Contenders, float]:
    """The DiT in torch, ONNX Runtime (float32, int8) and OpenVINO (float32, bfloat16)."""
    from export.graph import Signature, export_graph
    from export.quantise import quantise
    from student.bundle import BundleError
    from student.runtimes.session import open_session

    module = Medium().eval()
    graph, short = work / "dit.onnx", work / "dit-int8.onnx"
    signature = Signature("dit", {name: torch.from_numpy(row) for name, row in feed(2).items()}, ("noise",))
    graph.write_bytes(export_graph(module, signature, {}))
    quantise(graph, short, [feed(4)])

    def torch_run(batch: int, call: Callable[..., Any] = module) -> Run:
        inputs = [torch.from_numpy(row) for row in feed(batch).values()]
        return lambda: call(*inputs)

    def half(batch: int) -> Run:
        inputs = [torch.from_numpy(row) for row in feed(batch).values()]

        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return module(*inputs)

        return run

    found: Contenders = {"torch eager": torch_run, "torch autocast bf16": half}
    if compiled:
        fast = torch.compile(module)
        found["torch.compile"] = lambda batch: torch_run(batch, fast)
    found["ONNX Runtime fp32"] = _session(open_session(graph, threads))
    found["ONNX Runtime int8"] = _session(open_session(short, threads))
    if importlib.util.find_spec("openvino"):
        from student.runtimes.openvino import open_openvino

        for precision in ("fp32", "bf16"):
            try:
                found[f"OpenVINO {precision}"] = _session(open_openvino(graph, threads, precision))
            except BundleError as error:
                say(f"OpenVINO {precision} is left out: {error}")
    with FlopCounterMode(display=False) as counter:
        torch_run(1)()
    return found, float(counter.get_total_flops())


def feed(batch: int) -> dict[str, Any]:
    """Inputs of the DiT."""
    chance = np.random.default_rng(batch)
    x = chance.standard_normal((batch, 4, 32, 32), dtype=np.float32)
    return {"x": x, "timestep": chance.integers(0, 1000, batch), "label": chance.integers(0, 1000, batch)}


def _session(session: Any) -> Callable[[int], Run]:
    def at(batch: int) -> Run:
        inputs = feed(batch)
        return lambda: session.run(["noise"], inputs)

    return at


def report(title: str, contenders: Contenders, flops: float, peak: float, repeats: int) -> None:
    """Measure and print."""
    table = Table(title=f"{title} ({flops / 1e9:.2f} GFLOP an image)")
    table.add_column("")
    for batch in BATCHES:
        for column in (f"ms, batch {batch}", "times eager", "of peak"):
            table.add_column(column, justify="right")
    seconds = {batch: measure(contenders, batch, repeats) for batch in BATCHES}
    for name in contenders:
        cells = []
        for batch in BATCHES:
            took, eager = seconds[batch][name], seconds[batch]["torch eager"]
            cells += [f"{took * 1e3:.1f}", f"{eager / took:.2f}", f"{flops * batch / took / peak:.0%}"]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def measure(contenders: Mapping[str, Callable[[int], Run]], batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    clock = _clock()
    runs = {name: make(batch) for name, make in contenders.items()}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _clock() -> Callable[[], float]:
    """CPU time with one thread: on a shared machine the wall clock measures the neighbours.

    Threads that wait for each other cost CPU time too, so with several it is the wall clock.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


if __name__ == "__main__":
    typer.run(main)
