"""How a float32 graph becomes a target's: what is narrowed, what is linked, and what an engine is built with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import card, engine, targets, to_tensorrt, within
from export.engine import BuildError, Order
from export.errors import ExportError
from export.request import EngineOptions, Request
from export.select import find_target
from export.targets import Converted, narrowed
from export.to_tensorrt import TensorRT
from student.runtimes import openvino, session
from student.runtimes.machine import Gpu
from student.within_prompt import measure
from tests import tiny

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30, "13.0")
STAGES = ("text", "step", "step_2", "decoder", "step-96x32", "step_2-96x32x9", "decoder-96x32")
FLOAT32 = {"fp16": ("text", "decoder"), "bf16": ("decoder",)}


def asked(precision: str, **engine_options: Any) -> Request:
    options = EngineOptions(**engine_options)
    return Request(Path("b"), tiny.student({}), "staged", precision, threads=5, engine=options, say=lambda text: None)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each file, with how it came about: a link to a graph, or its precision and whether it is only rounded."""
    found: list[Any] = []
    monkeypatch.setattr(targets.ir, "load", lambda path: path)
    monkeypatch.setattr(targets, "narrow", lambda graph, precision, round_only=False: (graph, precision, round_only))
    monkeypatch.setattr(targets, "save", lambda model, path: found.append((path, *model)))
    monkeypatch.setattr(targets, "link_graph", lambda graph, path: found.append((path, graph)))
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16", "bf16", "fp8"])
def test_a_stage_is_narrowed_unless_it_stays_float32_at_every_size(
    written: list[Any], precision: str, stage: str, tmp_path: Path
) -> None:
    """What is proven on a CPU is rounded alone; around eight bits of a GPU all is bfloat16."""
    graph, target = tmp_path / "graph.onnx", tmp_path / f"{stage}.onnx"
    found = narrowed(asked(precision), stage, graph, target)
    around = {"fp8": "bf16"}.get(precision, precision)
    if around not in FLOAT32 or stage.partition("-")[0] in FLOAT32[around]:
        assert found == Converted(target, target) and written == [(target, graph)]
        return
    proof = tmp_path / f".{stage}.proof.onnx"
    assert found == Converted(target, proof)
    assert written == [(target, graph, around, False), (proof, graph, around, True)]


def test_the_proof_opens_graphs_as_they_will_be_served(
    written: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session, "open_session", lambda path, threads: ("onnx", path, threads))
    monkeypatch.setattr(openvino, "open_openvino", lambda path, threads, precision: (path, threads, precision))
    for name, precision, expected in (
        ("onnx", "int8", ("onnx", Path("a"), 5)),
        ("openvino", "bf16", (Path("a"), 5, "bf16")),
        ("openvino", "fp32", (Path("a"), 5, "fp32")),
    ):
        open_ = find_target(name).opener(asked(precision))
        assert open_ is not None and open_(Path("a")) == expected
    graph, target = tmp_path / "graph.onnx", tmp_path / "step"
    found = find_target("openvino").convert(asked("bf16"), "step", graph, target)
    assert found == Converted(tmp_path / "step.onnx", tmp_path / "step.onnx")
    assert written == [(tmp_path / "step.onnx", graph)], "OpenVINO rounds by itself"
    assert find_target("openvino").kept_float32("bf16") == {} == find_target("onnx").requires(asked("fp16"))


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "find_gpu", lambda: (H100, ""))
    monkeypatch.setattr(to_tensorrt, "library_version", lambda name: f"{name} 1")
    monkeypatch.setattr(
        to_tensorrt, "facts",
        lambda: {"os": "Linux", "arch": "x86_64", "gpu": H100.name, "compute_capability": "9.0", "cuda": "13.0"},
    )  # fmt: skip


def test_an_engine_is_built_of_the_narrowed_graph_as_it_was_ordered(
    written: list[Any], on_h100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[Any] = []
    shapes = {"latents": ("batch", 16, 8, 8)}
    monkeypatch.setattr(to_tensorrt, "shapes_of", lambda path: (shapes, {"not": path}))
    monkeypatch.setattr(to_tensorrt, "build_engine", lambda *given: built.append(given))
    options = {"memory_bytes": 7, "workspace_bytes": 8, "level": 5, "portable": True, "batch_invariant": True}
    request = asked("bf16", batches=(4, 1), **options)
    folder = tmp_path / "runtimes" / ".part"
    found = TensorRT("tensorrt_rtx").convert(request, "step", tmp_path / "graph.onnx", folder / "step")
    assert found == Converted(folder / "step.engine", folder / "step.engine")
    assert written[0] == (folder / ".step.source.onnx", tmp_path / "graph.onnx", "bf16", False)
    order = Order(
        library="tensorrt_rtx", onnx=str(folder / ".step.source.onnx"), plan=str(folder / "step.engine"), inputs=shapes,
        profiles=((1, 1, 1), (2, 4, 4)), workspace_bytes=8, level=5, portable=True, batch_invariant=True,
        timing_cache=str(tmp_path / "runtimes" / ".tensorrt_rtx-h100-80gb-hbm3.timing"), tf32=False,
    )  # fmt: skip
    assert built == [(order, 7, request.say, folder)]
    monkeypatch.setattr(to_tensorrt, "find_gpu", lambda: (None, "none"))
    TensorRT("tensorrt_rtx").convert(request, "step", tmp_path / "graph.onnx", folder / "step")
    assert built[1][0] == replace(order, timing_cache="") and TensorRT("tensorrt_rtx").opener(request) is None


def test_an_engine_requires_the_machine_and_library_that_it_was_built_with(on_h100: None) -> None:
    own = {
        "os": "Linux", "arch": "x86_64", "gpu": H100.name, "compute_capability": "9.0", "cuda": "13.0",
        "tensorrt": "tensorrt 1",
    }  # fmt: skip
    assert TensorRT("tensorrt").requires(asked("bf16")) == own
    portable = TensorRT("tensorrt").requires(asked("bf16", portable=True))
    assert portable == {name: value for name, value in own.items() if name not in ("gpu", "compute_capability")}
    assert TensorRT("tensorrt").kept_float32("fp8") == targets.reasons("fp8") != {}


class Library:
    """TensorRT's builder, as far as it is called: notes what it is told."""

    __name__, __version__ = "tensorrt", "11.4"
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    BuilderFlag = SimpleNamespace(TF32="tf32", DISTRIBUTIVE_INDEPENDENCE="independent")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)

    def __init__(self, plan: bytes | None = b"plan", error: Any = None) -> None:
        self.plan, self.error = plan, error
        self.config: Any = None
        self.typed = -1

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

    class IProgressMonitor:
        pass

    def Builder(self, log: Any) -> Any:
        library = self
        log.log(2, "a warning")
        log.log(1, "too\n little   memory")

        class Config:
            hardware_compatibility_level = None

            def __init__(self) -> None:
                self.flags, self.profiles, self.pools, self.caches = (
                    {"tf32"},
                    list[Any](),
                    dict[str, int](),
                    list[Any](),
                )

            def set_memory_pool_limit(self, pool: str, size: int) -> None:
                self.pools[pool] = size

            def clear_flag(self, flag: str) -> None:
                self.flags.discard(flag)

            def set_flag(self, flag: str) -> None:
                self.flags.add(flag)

            def create_timing_cache(self, data: bytes) -> bytes:
                return data

            def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
                self.caches.append((cache, ignore_mismatch))

            def get_timing_cache(self) -> Any:
                return SimpleNamespace(serialize=lambda: b"timings")

            def add_optimization_profile(self, profile: Any) -> None:
                self.profiles.append(profile)

        class Profile(dict[str, Any]):
            def set_shape(self, name: str, *shapes: Any) -> None:
                self[name] = shapes

        def network(flags: int) -> Any:
            library.typed = flags
            return SimpleNamespace(num_layers=4)

        library.config = Config()
        return SimpleNamespace(
            create_network=network, create_builder_config=lambda: library.config,
            create_optimization_profile=Profile, build_serialized_network=lambda network, config: library.plan,
        )  # fmt: skip

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return SimpleNamespace(parse_from_file=lambda path: self.error is None, get_error=lambda number: self.error)


def built(library: Library, monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    order = Order(
        "tensorrt", str(folder / "a.onnx"), str(folder / "a.engine"), {"x": ("batch", 4), "sigma": ("batch",)},
        ((1, 1, 1), (2, 3, 4)), 99, 2,
    )  # fmt: skip
    monkeypatch.setattr(engine.importlib, "import_module", lambda name: library if name == "tensorrt" else None)
    monkeypatch.setattr(engine.signal, "signal", lambda *given: None)
    engine.build(replace(order, **changes))


@pytest.mark.parametrize("on", [False, True])
def test_each_option_of_an_order_reaches_the_builder(
    on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library, cache = Library(), tmp_path / "cache"
    options = {"portable": on, "batch_invariant": on, "tf32": on, "timing_cache": str(cache) if on else ""}
    built(library, monkeypatch, tmp_path, **options)
    config = library.config
    assert config.flags == ({"tf32", "independent"} if on else set())
    assert (config.pools, config.builder_optimization_level) == ({"workspace": 99}, 2)
    assert config.hardware_compatibility_level == ("ampere+" if on else None)
    assert config.profiles == [
        {"x": ((1, 4), (1, 4), (1, 4)), "sigma": ((1,), (1,), (1,))},
        {"x": ((2, 4), (3, 4), (4, 4)), "sigma": ((2,), (3,), (4,))},
    ]
    assert library.typed == 1 << 3 and config.caches == ([(b"", False)] if on else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == (["a.engine", "cache"] if on else ["a.engine"])
    assert (tmp_path / "a.engine").read_bytes() == b"plan"
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"plan": str(tmp_path / "a.engine"), "bytes": 4, "layers": 4, "version": "11.4"}
    if on:
        built(library, monkeypatch, tmp_path, **options)
        assert cache.read_bytes() == b"timings" and library.config.caches == [(b"timings", False)]


def test_what_the_library_refuses_is_said_with_its_last_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "^tensorrt 11.4 cannot build a.onnx: too little memory$"
    with pytest.raises(BuildError, match=sentence):
        built(Library(plan=None), monkeypatch, tmp_path)
    error = SimpleNamespace(node_operator=lambda: "Det", node_name=lambda: "n7", desc=lambda: "no such thing")
    with pytest.raises(BuildError, match=r"^tensorrt cannot read a.onnx: the operator Det \(n7\): no such thing$"):
        built(Library(error=error), monkeypatch, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_builds_monitor_says_the_outer_phases_and_ends_a_build_that_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(engine.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    monitor = engine._monitor(Library)
    monitor.phase_start("Building", None, 7)
    monitor.phase_start("Inner", "Building", 3)
    assert capsys.readouterr().out == '{"phase": "Building", "steps": 7}\n'
    assert monitor.step_complete("Building", 1) is True
    handlers[engine.signal.SIGTERM](engine.signal.SIGTERM, None)
    assert monitor.step_complete("Building", 2) is False


def test_a_card_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of its tables: an interrupted run leaves the card that was there."""
    written: list[Path] = []
    monkeypatch.setattr(card, "write_atomically", lambda path, data: written.append(path))
    monkeypatch.setattr(card, "row_of", lambda outcome: "| row |")
    (tmp_path / "README.md").write_text("# card\n")
    outcome: Any = SimpleNamespace(made=(1,), folder=tmp_path / "r" / "a", manifest=SimpleNamespace(name="a"))
    card.update_card(tmp_path, outcome)
    scorer: Any = SimpleNamespace(reward="a", file="", mean=0.0, std=1.0)
    card.add_rewards_to_card(tmp_path, SimpleNamespace(scorers={"a": scorer}))  # type: ignore[arg-type]
    assert written == [tmp_path / "README.md"] * 2 and (tmp_path / "README.md").read_text() == "# card\n"


def test_a_scorer_that_scored_half_of_the_prompts_counts_and_if_none_did_it_is_said() -> None:
    nan, rng = float("nan"), np.random.default_rng(0)
    good = {prompt: rng.normal(size=3).tolist() for prompt in "abcd"}
    half = {prompt: [nan if prompt in "ab" else 0.5, 0.1, 0.2] for prompt in "abcd"}
    rows = {(2, p): {"good": good[p], "half": half[p]} for p in "abcd"}
    assert within._measured(rows, 2, "abcd") == measure(
        {"good": [good[p] for p in "cd"], "half": [half[p] for p in "cd"]}
    )
    few = {(2, p): {"few": [0.1 if p == "a" else nan, 0.5]} for p in "abcd"}
    with pytest.raises(ExportError, match="^too few pictures of 2 steps have a score: 1 prompts with 2 pictures each"):
        within._measured(few, 2, "abcd")
