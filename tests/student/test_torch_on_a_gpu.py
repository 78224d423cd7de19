"""What the torch runtime does on a GPU only: types, placement, batches measured and kept, compilation.

The GPU's memory is that of the CPU under another name (``cpu:0``), so the pictures have an answer key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from student.bundle import BundleError, Scorer, Student, read_student
from student.families.find import FAMILIES
from student.runtimes import placement as placement_module
from student.runtimes import torch as module
from student.runtimes.batches import FILE, Measured, read_table
from student.runtimes.lengths import longest
from student.runtimes.machine import Gpu
from student.runtimes.manifest import RUNTIMES
from student.runtimes.options import Options
from student.runtimes.placement import Placement, place
from student.runtimes.scoring import ScoreFn
from student.runtimes.torch import TorchModel, TorchRuntime
from tests.student.families import tiny

GIB = 2**30
DEVICE = "cpu:0"
MB = 10**6
FREE, RESERVED, ALLOCATED = 30 * MB, 20 * MB, 10 * MB
MEASURED = Measured({1: 1.0, 2: 1.1, 3: 1.2}, (1, 2), 3)
PROMPTS, SEEDS = ["a red heart", "a blue star", "ring"], [3, 1, 2]


def gpu(capability: str = "9.0", gib: float = 80) -> Gpu:
    return Gpu("NVIDIA X", capability, int(gib * GIB), "13.0")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """A machine with a GPU; the tensors that were pinned."""
    found: list[Tensor] = []
    monkeypatch.setattr(module, "find_gpu", lambda: (gpu(), ""))
    monkeypatch.setattr(module, "place", lambda *arguments: replace(place(*arguments), device=DEVICE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (FREE, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: RESERVED)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: ALLOCATED)
    monkeypatch.setattr(module, "measure", lambda draw, out_of_memory: MEASURED)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: found.append(self) or self)
    yield found


def built(folder: Path, name: str) -> Student:
    return tiny.build(folder, tiny.MAKERS[name]())


def opened(folder: Path, **options: Any) -> TorchRuntime:
    return TorchRuntime(folder, read_student(folder), 1, Options(**options))


@pytest.mark.parametrize(
    ("name", "capability", "types"),
    [
        ("sd3", "9.0", ("bfloat16", "bfloat16", "bfloat16")),
        ("sd3", "7.5", ("float16", "float32", "float16")),
        ("wan", "9.0", ("bfloat16", "float32", "bfloat16")),
    ],
)
def test_each_part_opens_in_the_type_that_the_gpu_and_the_family_want(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch, name: str, capability: str, types: tuple[str, ...]
) -> None:
    built(tmp_path / "student", name)
    monkeypatch.setattr(placement_module, "SMALL", 0)  # a tiny network would run in float32
    monkeypatch.setattr(module, "find_gpu", lambda: (gpu(capability), ""))
    monkeypatch.setattr(TorchRuntime, "_measured", lambda *arguments: {})
    family = opened(tmp_path / "student")._model.family
    encoders = [getattr(family, part) for part in family.encoders]
    for part, expected in zip((family.transformer, family.vae, *encoders), (*types, *types[2:] * 2), strict=False):
        floats = {value.dtype for value in part.parameters() if value.is_floating_point()}
        assert getattr(torch, expected) in floats and floats <= {getattr(torch, expected), torch.float32}


def test_a_gpu_without_room_for_what_a_call_needs_is_refused(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's decoder counts: its bytes for each pixel of the student's picture, where they are the most."""
    student = built(tmp_path / "student", "sd3")
    kind = next(kind for kind in FAMILIES.values() if kind.name == "sd3")
    monkeypatch.setattr(kind, "decoder_bytes_px", 90 * GIB / (student.image.height * student.image.width))
    with pytest.raises(BundleError, match=r"needs 90\.0 GiB of GPU memory"):
        opened(tmp_path / "student")


def test_scorers_are_opened_before_the_network_is_placed_in_the_memory_that_they_leave(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, free, given = built(tmp_path / "student", "sd3"), [70 * GIB], list[int]()
    student = replace(student, scorers={"own": Scorer("scorers/own.onnx", 0.0, 1.0, "heldout", reward="own:Reward")})

    def open_reward(name: str) -> ScoreFn:
        assert not given
        free[0] -= 3 * GIB
        return lambda images_BCHW, prompts: np.zeros(len(prompts), np.float32)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 80 * GIB))
    monkeypatch.setattr(module, "place", lambda *asked: given.append(asked[-1]) or Placement(DEVICE, "float32"))
    runtime = TorchRuntime(tmp_path / "student", student, 1, Options(open_reward))
    assert given == [3 * GIB] and runtime.scorers.names == ("own",)


@pytest.mark.parametrize("offload", ["off", "encoders", "cpu"])
def test_parts_lie_where_the_offload_says(tmp_path: Path, pinned: list[Tensor], offload: str) -> None:
    student = built(tmp_path / "student", "sd3")
    kind = next(kind for kind in FAMILIES.values() if kind.name == "sd3")
    family = module._open(tmp_path / "student", student, Placement("meta", "float32", offload), kind)
    encoders = [part for name in family.encoders if (part := getattr(family, name)) is not None]
    where = {part: {value.device.type for value in part.parameters()} for part in (family.transformer, *encoders)}
    assert where.pop(family.transformer) == {"meta"} == {value.device.type for value in family.vae.parameters()}
    assert len(encoders) == 3 and all(found == {"meta" if offload == "off" else "cpu"} for found in where.values())
    waiting = [value.shape for part in encoders for value in (*part.parameters(), *part.buffers())]
    assert [value.shape for value in pinned] == (waiting if offload == "encoders" else [])


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_offloaded_encoders_change_no_bit(tmp_path: Path, pinned: object, name: str) -> None:
    built(tmp_path / "student", name)
    off, *others = (opened(tmp_path / "student", offload=offload) for offload in ("off", "encoders", "cpu"))
    expected = off.draw(PROMPTS[:1], SEEDS[:1], 2)
    assert expected.std() > 0.02
    for runtime in others:
        np.testing.assert_array_equal(runtime.draw(PROMPTS[:1], SEEDS[:1], 2), expected)
    assert {runtime.placement.offload for runtime in others} == {"encoders", "cpu"}


def test_batches_are_measured_once_and_kept_in_the_bundle(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = built(tmp_path / "student", "sd3")
    on_cpu = TorchRuntime.__new__(TorchRuntime)  # the answer key is the runtime without a GPU
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        without.setattr(module, "place", place)
        TorchRuntime.__init__(on_cpu, tmp_path / "student", student, 1)
    assert on_cpu.batches == {} and not (tmp_path / "student" / RUNTIMES / FILE).exists()
    measured = []

    def measure(draw: Callable[..., np.ndarray], out_of_memory: Callable[[Exception], bool]) -> Measured:
        np.testing.assert_array_equal(draw(PROMPTS[:1], SEEDS[:1]), on_cpu.draw(PROMPTS[:1], SEEDS[:1], 2))
        assert out_of_memory(torch.OutOfMemoryError()) and not out_of_memory(ValueError())
        measured.append(1)
        return MEASURED

    monkeypatch.setattr(module, "measure", measure)
    for _ in range(2):  # the second start reads the table
        runtime = opened(tmp_path / "student")
        assert runtime.batches == dict.fromkeys(runtime.sizes, MEASURED) and runtime.max_batch == 3
    assert len(measured) == len(runtime.sizes) == 1
    (key,) = json.loads((tmp_path / "student" / RUNTIMES / FILE).read_text())
    assert read_table(tmp_path / "student" / RUNTIMES, key) == {"32x64": MEASURED}
    assert key.startswith(f"NVIDIA X {torch.__version__} float32 off off ")
    with pytest.raises(ValueError, match="the batch has 4 images: accepted is 1 to 3"):
        runtime.draw(["x"] * 4, range(4), 2)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    opened(tmp_path / "student", compile="on")
    assert len(measured) == 2, "another way of running is measured for itself"


def test_a_call_is_split_into_the_batches_that_change_no_byte(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path / "student", "sd3")
    runtime, rows = opened(tmp_path / "student"), list[int]()
    decode = runtime._model.family.decode
    monkeypatch.setattr(runtime._model.family, "decode", lambda x: rows.append(len(x)) or decode(x))
    images = runtime.draw(PROMPTS, SEEDS, 2)
    assert rows == [2, 1]
    for b in range(3):
        np.testing.assert_allclose(images[b], runtime.draw(PROMPTS[b : b + 1], SEEDS[b : b + 1], 2)[0], atol=1e-5)


def test_lengths_of_a_video_follow_from_the_memory_of_the_gpu(tmp_path: Path, pinned: object) -> None:
    """What the driver has free, and what torch holds and does not use: 30 + 20 - 10 MB."""
    built(tmp_path / "student", "wan")
    runtime = opened(tmp_path / "student")
    step, fixed_bytes, frame_bytes = runtime._model.family.video_memory(32, 64)
    ((size, lengths),) = runtime.lengths.items()
    assert size == runtime.sizes[0] and lengths.most == longest(40 * MB, fixed_bytes, frame_bytes, step)
    assert lengths.most != longest(30 * MB, fixed_bytes, frame_bytes, step)


class Recorded:
    """Stands in for ``nn.Module.compile``: notes its options, and answers as a CUDA graph does, always in the same
    memory."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.calls = 0

    def compile(self, network: nn.Module, **options: Any) -> None:
        self.asked.append(options)
        if options["mode"] != "reduce-overhead":
            return
        forward, kept = network.forward, dict[Any, Tensor]()

        def replayed(*arguments: Any, **named: Any) -> tuple[Tensor]:
            self.calls += 1
            (v,) = forward(*arguments, **{**named, "return_dict": False})
            return (kept.setdefault("v", torch.zeros(8, *v.shape[1:]))[: len(v)].copy_(v),)

        network.forward = replayed  # type: ignore[method-assign]


@pytest.mark.parametrize(("compile", "mode"), [("off", None), ("on", "default"), ("graphs", "reduce-overhead")])
def test_the_transformer_is_compiled_and_recorded_as_asked(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch, compile: str, mode: str | None
) -> None:
    """A recorded network overwrites its answer at the next call: with two calls a step, the first is copied."""
    built(tmp_path / "student", "sd3")
    expected = opened(tmp_path / "student").draw(PROMPTS, SEEDS, 2)
    recorded, begun = Recorded(), list[int]()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: recorded.compile(self, **options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(recorded.calls))
    runtime = opened(tmp_path / "student", compile=compile)
    assert recorded.asked == ([{"mode": mode, "dynamic": False}] if mode else [])
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 2), expected)
    assert begun == list(range(recorded.calls)), "each call begins a new step"
    assert recorded.calls == (2 + 2 * 2 if compile == "graphs" else 0), "one warm-up, then two parts at two steps"


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_every_size_and_batch_is_compiled_beyond_torchs_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes in batches of 1, 2, 4, 8 and 16 are more shapes than those after which torch gives up by itself."""
    shapes, compile = list[torch.Size](), nn.Module.compile

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        shapes.append(inputs[-1].shape)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode, dynamic: compile(self, backend=backend, dynamic=dynamic)
    )
    family = nn.Module()
    family.transformer = Doubled()
    asked = [torch.Size([batch, rows, 2]) for rows in (3, 5) for batch in (1, 2, 4, 8, 16)]
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would delete torch's own value afterwards
        TorchModel(family, Placement("cpu", "float32"), "on")  # type: ignore[arg-type]
        for shape in (*asked, *asked):
            family.transformer(torch.ones(shape))
    assert shapes == asked, "each once"


def test_each_size_has_batches_of_its_own_and_only_what_is_not_known_is_measured(
    tmp_path: Path, pinned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger one is measured when it comes in, on pictures of its own size, and drawn in its own batches."""
    built(tmp_path / "student", "sd3")
    (own,) = opened(tmp_path / "student").sizes
    larger, measured = (64, 96), list[tuple[int, ...]]()
    less = Measured({1: 1.0}, (1,), 1)

    def measure(draw: Callable[..., np.ndarray], out_of_memory: Callable[[Exception], bool]) -> Measured:
        measured.append(draw(PROMPTS[:1], SEEDS[:1]).shape)
        return less

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "sizes_of", lambda bundle, student: (own, larger))
    runtime = opened(tmp_path / "student")
    assert measured == [(1, 3, *larger)]
    assert runtime.batches == {own: MEASURED, larger: less} and runtime.max_batch == MEASURED.largest
    rows, decode = list[int](), runtime._model.family.decode
    monkeypatch.setattr(runtime._model.family, "decode", lambda x: rows.append(len(x)) or decode(x))
    assert runtime.draw(PROMPTS, SEEDS, 2, larger).shape == (3, 3, *larger) and rows == [1, 1, 1]
    rows.clear()
    assert runtime.draw(PROMPTS, SEEDS, 2, own).shape == (3, 3, *own) and rows == [2, 1]
    assert opened(tmp_path / "student").batches == runtime.batches and len(measured) == 1
