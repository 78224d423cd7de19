"""A run from its teacher to its bundle, by what is called in which order and with what."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student.base import ADAPTER
from training.config import changed
from training.experiment import run as module
from training.experiment.run import _save, _train, _whole_base, reopened, run
from training.rats.config import RatsConfig
from training.result import UNTRAINED

OUT = Path("out")


class Roles:
    """Notes what becomes of the networks."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    @contextmanager
    def role(self, name: str) -> Any:
        self.calls.append(("role", name))
        yield f"the {name}"
        self.calls.append(("out of", name))

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.calls.append((name, *given, *sorted(named.items())))


def setup_of(calls: list[Any], **settings: Any) -> Any:
    config = changed(RatsConfig(), {"student.nfe": (4, 2), "teacher.reference_nfe": 8, **settings})
    model = SimpleNamespace(device="the device", name="flux", max_tokens=77, transformer="trained", vae="vae")
    prompts = SimpleNamespace(test=["a", "b"], of_file=False)
    return SimpleNamespace(config=config, roles=Roles(calls), model=model, rewards="rewards", prompts=prompts)


def noting(calls: list[Any], name: str, answer: Any = None) -> Any:
    return lambda *given, **named: (calls.append((name, *given, *sorted(named.items()))), answer)[1]


@pytest.mark.parametrize("first", [True, False])
def test_the_teacher_is_measured_after_training_as_the_start_and_each_step_count_once(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    setup = setup_of(calls, **{"student.nfe": (4, 8, 2)})
    training = SimpleNamespace(run=noting(calls, "train"), is_first=first, best_at=40)
    monkeypatch.setattr(module, "trainer", noting(calls, "trainer", training))
    monkeypatch.setattr(module, "move", noting(calls, "move"))
    monkeypatch.setattr(module, "test_figures", lambda setup, *given: (calls.append(("figures", *given)), given[-1])[1])
    monkeypatch.setattr(module, "_save", noting(calls, "save"))
    monkeypatch.setattr(module, "state", lambda: SimpleNamespace(wait_for_everyone=noting(calls, "wait")))
    assert _train(setup, OUT) == ([8, 4, 2], 40)
    measured = [("figures", "the start", "teacher", nfe) for nfe in (8, 4, 2)]
    assert calls == [
        ("trainer", setup, OUT / "run"),
        ("train",),
        ("move", "rewards", "the device"),
        ("role", "start"),
        *measured,
        ("out of", "start"),
        ("gather", ("keep", first)),
        *([("save", setup, OUT)] if first else []),
        ("wait",),
    ]


WRITTEN: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "whole": ({}, [("merge", OUT / ADAPTER, "pipeline"), ("save", OUT, "t", "model", "fp32")]),
    "bf16": (
        {"compute.weights": "bf16", "lora.rank": 2},
        [("merge", OUT / ADAPTER, "pipeline"), ("save", OUT, "t", "model", "bf16")],
    ),
    "quantised": (
        {"compute.quantise": "nf4", "compute.weights": "bf16", "lora.rank": 2},
        [("dequantise", "base"), ("merge", OUT / ADAPTER, "pipeline"), ("save", OUT, "t", "model", "bf16")],
    ),
    "adapter": (
        {"student.bundle": "adapter", "lora.rank": 2},
        [("write_adapter", OUT / ADAPTER, "pipeline"), ("beside", OUT, "t", "flux")],
    ),
    "adapter of a quantised base": (
        {"student.bundle": "adapter", "lora.rank": 2, "compute.quantise": "fp8", "compute.weights": "bf16"},
        [("write_adapter", OUT / ADAPTER, "pipeline"), ("beside", OUT, "t", "flux")],
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_student_is_written_as_its_run_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, expected = WRITTEN[kind]
    calls: list[Any] = []
    setup = setup_of(calls, model="t", **settings)
    monkeypatch.setattr(module, "read_index", lambda *given: {"_class_name": "OurPipeline", "asked": given})
    monkeypatch.setattr(module, "diffusers", SimpleNamespace(OurPipeline="pipeline"))
    monkeypatch.setattr(module, "_whole_base", lambda setup: "base")
    monkeypatch.setattr(
        module, "save", lambda out, teacher, model, weights: calls.append(("save", out, teacher, "model", weights))
    )
    monkeypatch.setattr(module, "save_beside_adapter", noting(calls, "beside"))
    _save(setup, OUT)
    assert calls == expected


@pytest.mark.parametrize("begins", [None, "its own start"])
def test_adapters_of_a_quantised_base_are_put_on_what_the_student_began_as(
    begins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    setup = setup_of(calls, model="t", **{"compute.weights": "bf16", "lora.rank": 2})
    monkeypatch.setattr(module, "open_parts", noting(calls, "open", "pipe"))
    monkeypatch.setattr(module, "transformer_of", lambda pipe: f"transformer of {pipe}")
    monkeypatch.setattr(module, "student_start", noting(calls, "start", begins))
    assert _whole_base(setup) == (begins or "transformer of pipe")
    assert calls == [
        ("open", "t", ("transformer", "transformer_2", "scheduler"), torch.bfloat16),
        ("start", setup.config, "transformer of pipe"),
    ]


@pytest.mark.parametrize("of_file", [True, False])
@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize(("shard", "processes"), [(False, 2), (True, 2), (True, 1)])
def test_the_bundle_is_opened_as_the_run_computed(
    of_file: bool, guidance: float | None, shard: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    more = {"compute.tile_px": 64, "compute.weights": "bf16", "lora.rank": 2, "compute.shard": shard}
    setup = setup_of(calls, **more)
    setup.prompts.of_file, setup.model.guidance = of_file, guidance
    model = SimpleNamespace(transformer="opened", vae="its vae")
    monkeypatch.setattr(module, "open_family", noting(calls, "open", model))
    monkeypatch.setattr(module, "joined", lambda model: model)
    for name in ("remember", "quantise", "decode_tiles", "place", "shard"):
        monkeypatch.setattr(module, name, noting(calls, name))
    monkeypatch.setattr(module, "state", lambda: SimpleNamespace(num_processes=processes))
    assert reopened(setup, OUT) is model and setup.model.transformer == "opened", "what trained is let go of"
    options = [("guidance", 3.5)] if guidance else []
    assert calls == [
        ("close",),
        ("open", OUT, torch.bfloat16, *options, ("local_files_only", True), ("max_tokens", 77)),
        *([("remember", setup.config, model, "rewards", ["a", "b"])] if of_file else []),
        ("quantise", "opened", ""),
        ("decode_tiles", "its vae", 64),
        ("place", setup.config, model),
        *([("shard", "opened", 2)] if shard and processes > 1 else []),
    ]


@pytest.mark.parametrize(("is_main", "chosen_at", "processes"), [(True, 40, 1), (True, 0, 3), (False, 40, 3)])
def test_the_students_figures_are_the_bundles_and_the_run_is_marked_as_finished_at_the_end(
    is_main: bool, chosen_at: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    setup = setup_of(calls, **{"optim.batch": 2, "optim.accumulate": 4})
    (tmp_path / "run").mkdir()

    def row(label: str, nfe: int) -> tuple[Any, str]:
        return SimpleNamespace(label=label, nfe=nfe), f"pictures of the {label} at {nfe}"

    def write(out: Path, setup: Any, table: Any, pictures: Any, chosen: int) -> None:
        assert not (tmp_path / "run" / "finished").exists(), "only when all is written"
        calls.append(("write", out, [(one.label, one.nfe) for one in table], pictures, chosen))

    teachers = [row("teacher", 8), row("teacher", 4)]
    monkeypatch.setattr(module.environment, "write", noting(calls, "environment"))
    monkeypatch.setattr(module, "_train", lambda *given: (calls.append(("train", given[1])), (teachers, chosen_at))[1])
    monkeypatch.setattr(module, "reopened", noting(calls, "reopened", "the bundle"))
    monkeypatch.setattr(
        module, "test_figures", lambda setup, *given: (calls.append(("figures", *given)), row(given[1], given[2]))[1]
    )
    monkeypatch.setattr(module, "write", write)

    def remove(path: Path) -> None:
        assert (tmp_path / "run" / "finished").exists(), "a run that is killed between the two would begin again"
        calls.append(("remove", path))

    monkeypatch.setattr(module.checkpoint, "remove", remove)
    monkeypatch.setattr(module, "state", lambda: SimpleNamespace(is_main_process=is_main, num_processes=processes))
    with module.console.capture() as said:
        run(setup, tmp_path)
    table = [("teacher", 8), ("teacher", 4), ("student", 4), ("student", 2)]
    pictures = {f"{label}, {nfe} steps": f"pictures of the {label} at {nfe}" for label, nfe in table}
    rest = [("write", tmp_path, table, pictures, chosen_at), ("remove", tmp_path / "run" / "checkpoint.pt")]
    assert calls == [
        ("environment", tmp_path / "run" / "environment.json"),
        ("train", tmp_path),
        ("reopened", setup, tmp_path),
        *(("figures", "the bundle", "student", nfe) for nfe in (4, 2)),
        *(rest if is_main else []),
    ]
    assert (tmp_path / "run" / "finished").exists() == is_main
    text = " ".join(said.get().split())
    assert ("3 processes: a step has 24 samples, 8 of each" in text) == (is_main and processes > 1)
    assert is_main or not text
    assert ("processes" in text) == (is_main and processes > 1)
    assert (f"the student is in {tmp_path}" in text.replace("\n", "") or not is_main) and (
        (UNTRAINED[:40] in text) == (is_main and chosen_at == 0)
    )
