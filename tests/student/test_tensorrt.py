"""The TensorRT runtime against a stand-in of its API that computes the same graphs: launches, counts, bytes."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export import run as command
from student.bundle import BundleError, read_student
from student.files import sha256
from student.runtimes import tensorrt as module
from student.runtimes.engine import Cuda, Engine, EngineSession
from student.runtimes.machine import Gpu, library_version
from student.runtimes.manifest import read_manifest, write_manifest
from student.runtimes.onnx import onnx_runtime
from student.runtimes.runtime import StepwiseRuntime
from tests.student import stand_in_tensorrt as trt
from tests.student.families import tiny

PROMPTS, SEEDS = ("a red heart", "", "ring", "a blue star", "x"), (7, 1, 7, 3, 9)
PROFILES = ((1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 5, 5))
FOLDER = "tensorrt-staged-fp32-host-11.4.0"


class Host:
    """The device on which the stand-in runs; a recording is the same launches once more."""

    name = "cpu"
    handle = 0

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def use(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with its ONNX stages, and beside them plans that name them."""
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    tiny.build(folder, tiny.flux(guidance_embeds=True))
    add_plans(folder)
    return folder


def add_plans(folder: Path, profiles: tuple[tuple[int, int, int], ...] = PROFILES, **options: Any) -> None:
    """Compile a bundle to ONNX, and add the plans that name its graphs."""
    command.run(student=folder, to="onnx", **options)
    onnx, made = folder / "runtimes" / "onnx-staged-fp32", folder / "runtimes" / FOLDER
    made.mkdir()
    manifest = read_manifest(onnx)
    stages = {}
    for stage, graph in manifest.stages.items():
        plan = made / f"{stage}.engine"
        plan.write_text(json.dumps({"name": stage, "onnx": str(onnx / graph.file), "batches": profiles}))
        stages[stage] = replace(graph, file=plan.name, sha256=sha256(plan))
    write_manifest(made, replace(manifest, name=FOLDER, stages=stages, profiles=profiles))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    device = Host()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(module, "open_device", lambda library: device)
    trt.COUNTS.clear()
    trt.REFUSED.clear()
    yield device
    assert not trt.REFUSED


def open_runtime(bundle: Path) -> module.SteppedRuntime:
    runtime = module.tensorrt_runtime(bundle, read_student(bundle), 1, FOLDER, "tensorrt")
    assert isinstance(runtime, module.SteppedRuntime)
    return runtime


def test_it_draws_what_onnx_runtime_draws_watched_or_not(bundle: Path, host: Host) -> None:
    runtime = open_runtime(bundle)
    assert runtime.max_batch == 5 and isinstance(runtime, StepwiseRuntime)
    theirs = onnx_runtime(bundle, read_student(bundle), 1, "onnx-staged-fp32")
    for steps in (3, 2):
        ours = runtime.draw(PROMPTS, SEEDS, steps)
        np.testing.assert_allclose(ours, theirs.draw(PROMPTS, SEEDS, steps), atol=1e-5)
        np.testing.assert_array_equal(runtime.draw_watched(PROMPTS, SEEDS, steps, lambda i, preview: None), ours)
        for b in range(len(PROMPTS)):
            np.testing.assert_array_equal(runtime.draw(PROMPTS[b : b + 1], SEEDS[b : b + 1], steps)[0], ours[b])


def test_an_unwatched_batch_is_one_replay_and_nothing_is_made_anew(bundle: Path, host: Host) -> None:
    runtime = open_runtime(bundle)
    assert runtime.together == (1, 2, 3, 4, 5)  # the host's kernels do not care
    made = host.recorded, trt.COUNTS["contexts"]
    assert made == (2 * 5, 3 * 5)  # step counts times batch sizes, all in the warm-up
    trt.COUNTS.clear()
    before = host.replayed
    runtime.draw(PROMPTS, SEEDS, 3)
    assert host.replayed == before + 1 and (host.recorded, trt.COUNTS["contexts"]) == (10, 0)
    assert trt.COUNTS == {"launches": 5, "text of 5": 1, "step of 5": 3, "decoder of 5": 1}


def test_two_experts_are_each_launched_on_their_side_of_the_boundary(tmp_path: Path, host: Host) -> None:
    """Wan 2.2 14B: sigma 1 is above, the others are below; recorded and watched, at another length too."""
    tiny.build(tmp_path / "tiny", tiny.wan_14b(seed=3), steps=(3,), height_px=32)
    (tmp_path / "tiny" / "calibration.txt").write_text("a heart\na ring\n")
    add_plans(tmp_path / "tiny", PROFILES[:2], frames="5")
    runtime = open_runtime(tmp_path / "tiny")
    theirs = onnx_runtime(tmp_path / "tiny", runtime.student, 1, "onnx-staged-fp32")
    prompts, seeds = PROMPTS[:2], SEEDS[:2]
    ours = runtime.draw(prompts, seeds, 3)
    longer = runtime.draw(prompts, seeds, 3, frames=5)
    assert theirs.max_batch == 1, "videos are drawn one by one on a CPU"
    for b in range(2):
        np.testing.assert_allclose(ours[b : b + 1], theirs.draw(prompts[b : b + 1], seeds[b : b + 1], 3), atol=1e-5)
        alone = theirs.draw(prompts[b : b + 1], seeds[b : b + 1], 3, frames=5)
        np.testing.assert_allclose(longer[b : b + 1], alone, atol=1e-5)
    trt.COUNTS.clear()
    np.testing.assert_array_equal(runtime.draw_watched(prompts, seeds, 3, lambda i, preview: None), ours)
    counts = {"launches": 5, "text of 2": 1, "step of 2": 1, "step_2 of 2": 2, "decoder of 2": 1}
    assert trt.COUNTS == counts


def test_where_kernels_depend_on_the_batch_the_recording_of_one_is_replayed(bundle: Path, host: Host) -> None:
    runtime = open_runtime(bundle)
    graphs = runtime._graphs
    assert isinstance(graphs, module.EngineGraphs)
    alone = np.concatenate([runtime.draw([p], [s], 3) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    graphs.together = (1,)
    before, recorded = host.replayed, host.recorded
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 3), alone)
    assert (host.replayed, host.recorded) == (before + 5, recorded)
    seen: list[int] = []
    watched = runtime.draw_watched(PROMPTS, SEEDS, 3, lambda i, preview: seen.append(i))
    np.testing.assert_array_equal(watched, alone)
    assert seen == [0, 1] and host.replayed == before + 5
    graphs.together = (1, 2)  # two may go together: two calls of two, one of one
    trt.COUNTS.clear()
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 3), alone)
    assert {name: count for name, count in trt.COUNTS.items() if "decoder" in name} == {
        "decoder of 2": 2,
        "decoder of 1": 1,
    }


def test_the_runtime_finds_out_itself_which_sizes_go_together(
    bundle: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder whose last bit follows the batch, but for batches of four: as another machine's kernels might."""
    run = trt.Context.execute_async_v3

    def other_bits(self: trt.Context, stream: int) -> bool:
        done = run(self, stream)
        if self._engine.name == "decoder" and self._shapes["latents"][0] not in (1, 4):
            images = self._view("images", (self._shapes["latents"][0], 3, 64, 32))
            images[...] = np.nextafter(images, np.float32(2))
        return done

    monkeypatch.setattr(trt.Context, "execute_async_v3", other_bits)
    runtime = open_runtime(bundle)
    assert runtime.together == (1, 4) and not runtime.batches_are_independent
    ours = runtime.draw(PROMPTS, SEEDS, 2)
    for b in range(5):
        np.testing.assert_array_equal(runtime.draw(PROMPTS[b : b + 1], SEEDS[b : b + 1], 2)[0], ours[b])
    trt.COUNTS.clear()
    runtime.draw(PROMPTS, SEEDS, 2)
    assert {name for name in trt.COUNTS if "decoder" in name} == {"decoder of 4", "decoder of 1"}


def test_a_preview_is_what_the_network_predicts_and_a_stop_ends_the_drawing(bundle: Path, host: Host) -> None:
    runtime, theirs = open_runtime(bundle), onnx_runtime(bundle, read_student(bundle), 1, "onnx-staged-fp32")
    assert isinstance(theirs, StepwiseRuntime)
    seen: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    runtime.draw_watched(PROMPTS, SEEDS, 3, lambda i, preview: seen.append(preview([4, 1])))
    theirs.draw_watched(PROMPTS, SEEDS, 3, lambda i, preview: expected.append(preview([4, 1])))
    np.testing.assert_allclose(np.stack(seen), np.stack(expected), atol=1e-5)

    def stop(step: int, preview: object) -> None:
        raise InterruptedError(step)

    trt.COUNTS.clear()
    with pytest.raises(InterruptedError, match="0"):
        runtime.draw_watched(PROMPTS, SEEDS, 3, stop)
    assert trt.COUNTS["step of 5"] == 1 and trt.COUNTS["decoder of 5"] == 0


@pytest.fixture
def engine(bundle: Path, host: Host) -> Engine:
    found = Engine(bundle / "runtimes" / FOLDER / "decoder.engine", "tensorrt", host)
    found.share(torch.empty(found.scratch_bytes, dtype=torch.uint8))
    return found


def test_what_the_library_refuses_is_an_error(engine: Engine, host: Host) -> None:
    with pytest.raises(ValueError, match="was not built for a batch of 6"):
        engine.bind(6)
    tensors = engine.bind(2)
    tensors["latents"].zero_()
    engine.launch(2)
    context = engine._contexts[2]
    del context._addresses["images"]
    with pytest.raises(RuntimeError, match="refused to run in decoder.engine"):
        engine.launch(2)
    engine._tensors[3] = {name: torch.empty(3, *tensor.shape[2:]) for name, tensor in tensors.items()}
    with pytest.raises(RuntimeError, match="refused latents of shape"):
        engine.bind(3)
    engine._profile = lambda batch: 9  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="refused its profile 9"):
        engine.bind(1)
    assert len(trt.REFUSED) == 3
    trt.REFUSED.clear()


def test_too_little_working_memory_is_an_error(bundle: Path, host: Host) -> None:
    small = Engine(bundle / "runtimes" / FOLDER / "decoder.engine", "tensorrt", host)
    small.share(torch.empty(small.scratch_bytes - 1, dtype=torch.uint8))
    small.bind(1)
    with pytest.raises(RuntimeError, match="refused to run"):
        small.launch(1)
    trt.REFUSED.clear()


def test_a_plan_of_another_gpu_is_refused_in_one_sentence(bundle: Path, host: Host, tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"\x00plan")
    with pytest.raises(BundleError, match="x.engine does not open in tensorrt 11.4.0 on this GPU: make it again"):
        Engine(tmp_path / "x.engine", "tensorrt", host)
    trt.REFUSED.clear()


def test_a_session_is_a_stage_with_numpy_in_and_out(bundle: Path, host: Host, engine: Engine) -> None:
    latents = np.random.default_rng(1).normal(size=(2, tiny.CHANNELS, 8, 4)).astype(np.float32)
    (ours,) = EngineSession(engine, host).run(["images"], {"latents": latents})
    graph = onnx_runtime(bundle, read_student(bundle), 1, "onnx-staged-fp32")
    np.testing.assert_allclose(ours, graph._graphs.decode(latents), atol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"tensorrt-cu13-bindings": "11.4.0"}, "11.4.0"),
        ({"tensorrt-cu12-bindings": "11.3.0"}, "11.3.0"),
        ({"tensorrt": "11.4.1", "tensorrt-cu13-bindings": "11.4.0"}, "11.4.1"),
        ({}, "unknown"),
    ],
)
def test_export_and_serving_read_one_version(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: str
) -> None:
    machine = importlib.import_module("student.runtimes.machine")

    def version(package: str) -> str:
        if package not in installed:
            raise machine.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(machine, "version", version)
    assert library_version("tensorrt") == expected
    from export.to_tensorrt import TensorRT

    request: Any = type("Request", (), {"form": "staged", "precision": "fp32"})()
    assert TensorRT("tensorrt").folder(request).endswith(f"-{expected}")


def test_without_a_gpu_it_is_refused_before_the_library_is_touched(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy", symlinks=True)
    with pytest.raises(BundleError, match="tensorrt needs an NVIDIA GPU, and"):
        module.tensorrt_runtime(tmp_path / "copy", read_student(bundle), 1, FOLDER, "tensorrt")
    assert "tensorrt" not in sys.modules


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: (Gpu("NVIDIA L40S", "8.9", 1, "13.0"), ""))
    with pytest.raises(BundleError, match="^tensorrt needs torch with CUDA, and torch .* is built without it$"):
        module.open_device("tensorrt")
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "Cuda", lambda: made.append("device") or "device")
    assert module.open_device("tensorrt") == "device" and made == ["device"]  # type: ignore[comparison-overlap]


def test_of_several_engines_that_of_this_gpu_serves_and_else_the_first_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="has no runtime tensorrt: make it with export.run --to tensorrt$"):
        module._fitting(tmp_path, "tensorrt")
    names = ("tensorrt-staged-bf16-h100-11.4", "tensorrt-staged-bf16-l40s-11.4", "tensorrt_rtx-staged-bf16-a10-1.2")
    for name in names:
        (tmp_path / "runtimes" / name).mkdir(parents=True)
    (tmp_path / "runtimes" / "tensorrt-staged-bf16-a10-11.4").touch()
    for gpu, expected in (("L40S", names[1]), ("H100", names[0]), ("A10", names[0]), ("", names[0])):
        found = Gpu(f"NVIDIA {gpu}", "8.9", 1, "13.0") if gpu else None
        monkeypatch.setattr(module, "find_gpu", lambda found=found: (found, ""))
        assert module._fitting(tmp_path, "tensorrt") == expected, gpu


def test_the_largest_batch_is_the_largest_of_all_profiles() -> None:
    for profiles, most in (((), 1), (((1, 1, 1), (5, 6, 8), (2, 4, 4)), 8)):
        assert module.largest_batch(SimpleNamespace(profiles=profiles)) == most  # type: ignore[arg-type]


def test_a_recording_is_made_on_the_engines_own_stream_after_it_has_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runs choose kernels and memory, and must be over before a recording begins; other threads may draw."""
    done: list[Any] = []

    class Stream:
        cuda_stream = 7

        def __init__(self, device: str) -> None:
            done.append(("stream", device))

        def synchronize(self) -> None:
            done.append("waited")

    class Graph:
        def replay(self) -> None:
            done.append("replayed")

    @contextlib.contextmanager
    def recording(graph: Any, stream: Any, capture_error_mode: str = "global") -> Iterator[None]:
        assert isinstance(graph, Graph) and isinstance(stream, Stream) and capture_error_mode == "thread_local"
        done.append("begins")
        yield
        done.append("ends")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ("on", stream))
    cuda = Cuda()
    assert (cuda.name, cuda.handle, cuda.use()) == ("cuda:0", 7, ("on", cuda._stream))  # type: ignore[comparison-overlap]
    replay = cuda.record(lambda: done.append("run"))
    assert done == [("stream", "cuda:0"), "run", "run", "run", "waited", "begins", "run", "ends"]
    replay()
    assert done[-1] == "replayed"
