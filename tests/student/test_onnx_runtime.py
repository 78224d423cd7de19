"""The ONNX runtime against torch, its independence of the batch, and each reason to refuse it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from rewards import shapes
from student.bundle import BundleError, read_student, to_json
from student.pipeline import reproduce
from student.runtimes import onnx, session
from student.runtimes.compiled import CompiledRuntime
from student.runtimes.load import load
from student.runtimes.onnx import onnx_runtime
from student.runtimes.runtime import CpuSharing
from student.tokens import PromptTokens
from tests import tiny

SEEDS = (0, 1, 2, 3, 2**32 - 1, 5, 5)


@pytest.fixture(scope="module")
def runtime(compiled: Path) -> CompiledRuntime:
    return onnx_runtime(compiled, read_student(compiled), threads=1)


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "tiny"))


@pytest.mark.parametrize("steps", [2, 4])
def test_diffusers_draws_the_same_pictures(compiled: Path, runtime: CompiledRuntime, steps: int) -> None:
    """What a served picture promises: within 2/255 of diffusers, opened as anyone would, seed for seed."""
    pipe = DiffusionPipeline.from_pretrained(compiled)
    theirs = reproduce(pipe, runtime.student, tiny.PROMPTS, SEEDS, steps)
    images = runtime.draw(tiny.PROMPTS, SEEDS, steps)
    assert images.shape == (7, 3, 64, 64) and images.dtype == np.float32 and images.std() > 0.1
    np.testing.assert_allclose(images, theirs, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_batch_mates(compiled: Path, threads: int) -> None:
    runtime = onnx_runtime(compiled, read_student(compiled), threads)
    prompts, seeds = [*tiny.PROMPTS, "a blue heart"], [*SEEDS, 9]
    together = runtime.draw(prompts, seeds, 4)
    for size in range(1, 8):
        np.testing.assert_array_equal(runtime.draw(prompts[:size], seeds[:size], 4), together[:size])
    np.testing.assert_array_equal(runtime.draw(prompts[::-1], seeds[::-1], 4)[::-1], together)


def test_beside_others_a_call_takes_its_share_of_the_threads_and_draws_the_same_bytes(compiled: Path) -> None:
    student = read_student(compiled)
    runtime = onnx_runtime(compiled, student, 2, crowded_threads=1)
    assert runtime.cpu_sharing is not None and runtime.cpu_sharing.allowed and not runtime.cpu_sharing.crowded
    alone = runtime.draw(tiny.PROMPTS, SEEDS, 4)
    runtime.cpu_sharing.crowded = True
    np.testing.assert_array_equal(runtime.draw(tiny.PROMPTS, SEEDS, 4), alone)
    assert onnx_runtime(compiled, student, 2).cpu_sharing is None


def test_which_session_runs_follows_the_sharing(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    class Counted:
        def __init__(self, path: Path, threads: int) -> None:
            self.threads = threads

        def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
            ran.append(self.threads)
            return []

    monkeypatch.setattr(session, "open_session", Counted)
    cpu_sharing = CpuSharing()
    shared = session.SharingSession(compiled, 8, 2, cpu_sharing)
    for crowded, allowed in ((False, True), (True, True), (True, False), (False, False)):
        cpu_sharing.crowded, cpu_sharing.allowed = crowded, allowed
        shared.run([], {})
    assert ran == [8, 2, 8, 8]


def test_fewer_threads_that_change_bytes_are_not_used(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may cut a sum in another way for another number of threads."""
    run = session.OrtSession.run

    def sensitive(self: session.OrtSession, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        few = self._session.get_session_options().intra_op_num_threads == 1
        return [np.nextafter(array, np.float32(2)) if few else array for array in run(self, names, feed)]

    monkeypatch.setattr(session.OrtSession, "run", sensitive)
    runtime = onnx_runtime(compiled, read_student(compiled), 2, crowded_threads=1)
    assert runtime.cpu_sharing is not None and not runtime.cpu_sharing.allowed
    alone = runtime.draw(tiny.PROMPTS, SEEDS, 4)
    runtime.cpu_sharing.crowded = True
    np.testing.assert_array_equal(runtime.draw(tiny.PROMPTS, SEEDS, 4), alone)


def test_a_large_student_is_held_once(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_session = onnx.open_session

    def noted(path: Path, threads: int, tensorrt: bool = False) -> session.OrtSession:
        opened.append(threads)
        return open_session(path, threads, tensorrt)

    monkeypatch.setattr(onnx, "open_session", noted)
    monkeypatch.setattr(onnx, "OPENED_TWICE", 1000)
    assert onnx_runtime(compiled, read_student(compiled), 2, crowded_threads=1).cpu_sharing is None
    assert set(opened) == {1}, "its share of the cores, at any time"


def test_cuda_is_taken_where_it_is_and_tensorrt_only_if_asked_for() -> None:
    from student.runtimes.session import providers

    cpu, cuda, tensorrt = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
    names = [[one if isinstance(one, str) else one[0] for one in providers(available, asked)]
             for available in ([cpu], [tensorrt, cuda, cpu]) for asked in (False, True)]  # fmt: skip
    assert names == [[cpu], [cpu], [cuda, cpu], [tensorrt, cuda, cpu]]


class BatchSensitive:
    """A session whose images depend, in the last bit, on the size of the batch: what another machine might do."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any]) -> list[np.ndarray]:
        x_BCHW = feed["noise"]
        self.sizes.append(len(x_BCHW))
        images = np.repeat(x_BCHW.mean(axis=(1, 2, 3)), 3 * 64 * 64).reshape(-1, 3, 64, 64).astype(np.float32)
        return [images if len(images) == 1 else np.nextafter(images, np.float32(2))]


def test_where_kernels_depend_on_the_batch_images_are_drawn_one_by_one(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = BatchSensitive()
    monkeypatch.setattr(onnx, "open_session", lambda path, threads, tensorrt: session)
    runtime = onnx_runtime(compiled, read_student(compiled), threads=1)
    assert not runtime.batches_are_independent
    session.sizes.clear()
    together = runtime.draw(["a", "b", "c"], [1, 2, 3], 4)
    assert session.sizes == [1, 1, 1]
    np.testing.assert_array_equal(runtime.draw(["b"], [2], 4), together[1:2])


def test_scores_are_those_of_the_torch_modules_standardised(compiled: Path, runtime: CompiledRuntime) -> None:
    images = runtime.draw(tiny.PROMPTS, SEEDS, 4)
    scores = runtime.score(images, tiny.PROMPTS)
    ids = torch.from_numpy(PromptTokens(compiled, tiny.MAX_TOKENS).encode_clip(tiny.PROMPTS))
    in_bytes = torch.from_numpy(np.rint(images * 255) / 255)  # as a file has them
    for name, (mean, std) in {"trained": (0.1, 0.02), "heldout": (-0.3, 0.5)}.items():
        module = shapes.load(compiled.with_name("tiny-scorers") / name)
        with torch.inference_mode():
            raw_B = module(in_bytes, ids).numpy()
        np.testing.assert_allclose(scores[name], (raw_B - mean) / std, atol=1e-4)
        assert scores[name].dtype == np.float32 and scores[name].std() > 0
        np.testing.assert_allclose(runtime.score(images[2:3], tiny.PROMPTS[2:3])[name], scores[name][2:3], atol=1e-4)
    assert scores.keys() == {"trained", "heldout"}


def test_calls_out_of_range_are_refused(runtime: CompiledRuntime) -> None:
    for prompts, seeds, steps, message in (
        ([], [], 4, "prompts and seeds are 0 and 0"),
        (["a"] * 9, range(9), 4, "the batch has 9 images: accepted is 1 to 8"),
        (["a"], [1], 50, "steps is 50: tiny was trained for 4, 2"),
        (["a"], [2**32], 4, "seed is 4294967296"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.draw(prompts, seeds, steps)


def test_a_worker_that_serves_through_onnx_never_imports_torch(compiled: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from student.runtimes.load import load\n"
        f"runtime = load(pathlib.Path({str(compiled)!r}))\n"
        "images = runtime.draw(['a red heart'], [1], 4)\n"
        "scores = runtime.score(images, ['a red heart'])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)\n"
        "print(runtime.name, sorted(scores), sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "onnx-fused-fp32 ['heldout', 'trained'] []\n" and done.stderr == ""


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda bundle: _edit(bundle / "runtimes" / "onnx-fused-fp32" / "manifest.json", change)


def _append(name: str) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        with (bundle / name).open("ab") as file:
            file.write(b" ")

    return spoil


def _retrained(bundle: Path) -> None:
    """Other weights with a manifest that is right about them: the compiled runtime is stale."""
    _append("vae/config.json")(bundle)
    student = to_json(read_student(bundle))
    from student.files import hash_files

    (bundle / "student.json").write_text(json.dumps(student | {"files": hash_files(bundle)}))


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda b: shutil.rmtree(b / "runtimes"), "has no runtime onnx-fused-fp32: make it with export.run"),
    (_retrained, r"was made from another student \(source_sha256 differs\)"),
    (_manifest(lambda d: d["graphs"].pop("2")), "has no graph for 2 steps"),
    (_manifest(lambda d: d["graphs"]["4"].update(sigmas=[1.0, 0.75, 0.5, 0.26])), "has other sigmas for 4 steps"),
    (
        _manifest(lambda d: d["parity"]["2"]["max_abs"].update({"7": 0.01})),
        "differs from the torch pipeline by 0.01 at 2",
    ),
    (_manifest(lambda d: d["parity"].pop("4")), "was never compared with the torch pipeline at 4 steps"),
    (_manifest(lambda d: d.update(format=2)), "format is 2, this version reads format 1"),
    (_manifest(lambda d: d.pop("form")), "cannot be used: .*form"),
    (_append("runtimes/onnx-fused-fp32/4-steps.onnx"), r"4-steps\.onnx has changed since it was made"),
    (lambda b: (b / "runtimes/onnx-fused-fp32/2-steps.onnx").unlink(), r"2-steps\.onnx is missing"),
    (_append("tokenizer/tokenizer.json"), r"tokenizer/tokenizer\.json has changed"),
    (_append("scorers/trained.onnx"), r"trained\.onnx does not match its manifest"),
    (lambda b: (b / "scorers/trained.json").unlink(), r"trained\.onnx has no manifest trained\.json"),
    (
        lambda b: _edit(b / "student.json", lambda d: d["scorers"]["heldout"].update(source_sha256="0")),
        r"heldout\.onnx does not match the scorer that the student was calibrated on",
    ),
    (
        lambda b: _edit(b / "scorers/heldout.json", lambda d: d.update(tokenizer_sha256="0")),
        r"heldout\.onnx does not match its tokenizer",
    ),
    (lambda b: _edit(b / "scorers/heldout.json", lambda d: d.pop("format")), "was compiled by another version"),
    (
        lambda b: (b / "scorers/heldout.onnx.data").write_bytes(b"other"),
        r"heldout\.onnx does not match its weights",
    ),
    (
        lambda b: _edit(b / "scorers/heldout.json", lambda d: d.update(data_sha256="0")),
        r"heldout\.onnx does not match its weights",
    ),
]


@pytest.mark.parametrize("spoil, message", REFUSED)
def test_a_runtime_that_does_not_match_is_refused(copy: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(copy)
    with pytest.raises(BundleError, match=message):
        load(copy, "onnx")


def test_a_graph_that_onnxruntime_cannot_read_is_one_sentence(copy: Path) -> None:
    graph = copy / "scorers" / "trained.onnx"
    graph.write_bytes(b"not a graph")
    from student.files import sha256

    _edit(copy / "scorers" / "trained.json", lambda d: d.update(sha256=sha256(graph)))
    with pytest.raises(BundleError, match=r"trained\.onnx does not open in onnxruntime \S+: [^\n]+$"):
        load(copy, "onnx")
