"""The proof must fail where an export is wrong; each wrong thing is done to one of the two sides."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import ExportError
from export.verify import BATCHES, FP32_TOLERANCE, difference, image_parity, score_parity
from rewards import shapes
from student.bundle import Student, read_student
from student.pipeline import open_pipeline
from student.runtimes.onnx import FusedGraphs
from student.runtimes.session import open_session
from student.tokens import PromptTokens


@pytest.fixture
def pipe(compiled: Path) -> Any:
    return open_pipeline(compiled)


@pytest.fixture(scope="module")
def student(compiled: Path) -> Student:
    return read_student(compiled)


@pytest.fixture(scope="module")
def graphs(compiled: Path, student: Student) -> FusedGraphs:
    folder = compiled / "runtimes" / "onnx-fused-fp32"
    return FusedGraphs(compiled, student, {steps: folder / f"{steps}-steps.onnx" for steps in (4, 2)}, threads=1)


def test_an_honest_export_passes_at_both_batches(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    parity = image_parity(graphs, pipe, student, 4)
    assert tuple(parity.max_abs) == BATCHES == (1, 7)
    assert 0 < max(parity.max_abs.values()) < FP32_TOLERANCE / 10


def _swap_scale_and_shift(pipe: Any) -> None:
    config = pipe.vae.config
    pipe.vae.register_to_config(scaling_factor=config.shift_factor, shift_factor=config.scaling_factor)


def _nudge_a_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.weight *= 1.02


def _other_eos(pipe: Any) -> None:
    pipe.text_encoder.eos_token_id = 2  # the rule that pools at the highest token id


WRONG: dict[str, Callable[[Any], Any]] = {
    "swapped factors": _swap_scale_and_shift,
    "no shift factor": lambda pipe: pipe.vae.register_to_config(shift_factor=0.0),
    "a weight": _nudge_a_weight,
    "pooling": _other_eos,
    "tokenizer": lambda pipe: setattr(pipe, "tokenizer_2", pipe.tokenizer),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_pipeline_that_differs_is_caught(
    graphs: FusedGraphs, pipe: Any, student: Student, wrong: Callable[[Any], Any]
) -> None:
    if wrong is WRONG["tokenizer"]:
        student = replace(student, max_tokens=20)
    wrong(pipe)
    with pytest.raises(ExportError, match="the images of 4 steps differ from torch by .* nothing was written"):
        image_parity(graphs, pipe, student, 4)


def test_a_wrong_sigma_is_caught(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    other = replace(student, sigmas={**student.sigmas, 4: (1.0, 0.75, 0.5, 0.26)})
    with pytest.raises(ExportError, match="images of 4 steps"):
        image_parity(graphs, pipe, other, 4)


def test_a_broken_scorer_is_caught(compiled: Path) -> None:
    session = open_session(compiled / "scorers" / "trained.onnx", 1)
    ids_BL = PromptTokens(compiled, 24).encode_clip(["a red heart"] * 7)
    module = shapes.load(compiled.with_name("tiny-scorers") / "trained")
    assert max(score_parity(session, module, 0.02, (64, 64), ids_BL).max_abs.values()) < FP32_TOLERANCE
    with torch.no_grad():
        module.read[-1].bias += 1e-4
    with pytest.raises(ExportError, match="standardised scores differ"):
        score_parity(session, module, 0.02, (64, 64), ids_BL)


def test_what_is_not_a_number_never_passes() -> None:
    ones = np.ones((2, 3), np.float32)
    assert difference(ones, ones) == 0
    assert difference(ones, ones + 0.5) == 0.5
    for bad in (np.full((2, 3), np.nan, np.float32), np.full((2, 3), np.inf, np.float32), ones[:1]):
        assert difference(ones, bad) == difference(bad, ones) == float("inf")
