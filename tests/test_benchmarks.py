"""The scripts that measure: what they print where something is missing, and that what they say is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_test, runtimes, train_step
from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce
from student.runtimes.machine import find_gpu
from training.config import changed
from training.experiment.presets import flux_dev


@pytest.mark.skipif(find_gpu()[0] is not None, reason="this machine has a GPU, on which the script would run")
def test_without_a_gpu_there_is_one_sentence_for_each_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_test.sys, "argv", ["gpu_test"])
    gpu_test.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nothing can be tested on a GPU: ")
    assert len(lines) == 1 + len(gpu_test.PARTS)
    for part, line in zip(gpu_test.PARTS, lines[1:], strict=True):
        assert line.startswith(f"{part.name}: ") and line.endswith("."), line


def test_a_part_that_takes_its_process_down_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_test, "_missing", lambda part: "")
    monkeypatch.setattr(gpu_test.sys, "executable", "/bin/false")
    assert gpu_test._run(0).why_not == "failed with status 1: it said nothing"


@pytest.mark.skipif(find_gpu()[0] is not None, reason="on this machine's GPU the script itself shows it")
def test_the_torch_part_draws_with_the_runtime_that_serves(bundle: Path) -> None:
    """More pictures than a call of it takes."""
    prompts = ["a red heart", "ring", "a blue star"] * 3
    ours = gpu_test._drawer(gpu_test.PARTS[0], bundle)(prompts, list(range(9)), 2)
    theirs = reproduce(open_pipeline(bundle), read_student(bundle), prompts, range(9), 2)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_contenders_take_turns_and_each_gets_its_own_median() -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Callable[[int], runtimes.Run]:
        def at(batch: int) -> runtimes.Run:
            def run() -> None:
                calls.append(name)
                end = time.process_time() + seconds * batch
                while time.process_time() < end:
                    pass

            return run

        return at

    found = runtimes.measure({"slow": contender("slow", 0.02), "fast": contender("fast", 0.001)}, 2, 3)
    assert calls == ["slow", "fast"] * 4
    assert found["slow"] >= 0.04 and found["fast"] >= 0.002


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 1e8 < runtimes.peak_flops(1) < 1e14


TINY = replace(
    train_step.SMALL,
    transformer={
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
    channels=(32, 32, 32, 32),
)
STEP = changed(
    flux_dev(), {"student.nfe": (2,), "teacher.nfe": 3, "image.height_px": 32, "image.width_px": 32, "lora.rank": 2}
)


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", False), ("detached", True), ("last_k", True)])
def test_what_is_counted_without_weights_is_what_a_training_step_does(mode: str, checkpointing: bool) -> None:
    """torch counts the trainer's own method, with decoder and reward, while it really runs."""
    config = changed(STEP, {"gradient.mode": mode, "compute.checkpointing": checkpointing, "compute.precision": "fp32"})
    rats = train_step.method(config, TINY, "cpu")
    with FlopCounterMode(display=False) as counter:
        train_step.gradient(rats, "cpu")
    assert train_step.tflop(config, TINY) * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_measured_step_changes_the_student_and_its_average() -> None:
    config = changed(STEP, {"teacher.ema": 0.5})
    rats = train_step.method(config, TINY, "cpu")
    roles = rats.roles
    assert {p.dtype for p in roles.model.vae.parameters()} == {torch.bfloat16}
    assert roles.model.transformer.x_embedder.weight.dtype == torch.bfloat16
    train_step.gradient(rats, "cpu")
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.trainable)
    assert train_step.measure(config, TINY, "cpu", 1)[0] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured at full size")
def test_the_cost_of_a_step_is_printed_on_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "SMALL", TINY)
    train_step.main(nfe=2, teacher_nfe=3, side_px=32, lora_rank=2, repeats=1, small=True)
    text = " ".join(capsys.readouterr().out.split())
    assert "1229.6" in text and all(mode in text for mode in train_step.MODES)
    assert "Not in it: text encoders" in text and "say nothing of FLUX.1-dev" in text
