"""The proof must fail where an export is wrong; each wrong thing is done to one of the two sides."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.errors import ExportError
from export.graph import save
from export.narrow import narrow
from export.scorers import prove_scorer
from export.verify import (
    BATCHES,
    BF16,
    FP16,
    FP32,
    MORE_PROMPTS,
    difference,
    image_parity,
    prove,
    psnr_db,
    relative_norm,
    stage_errors,
)
from rewards.tokenized import load
from student.bundle import Student, read_student
from student.pipeline import open_pipeline
from student.runtimes.compiled import FusedGraphs
from student.runtimes.manifest import DECODER, STEP, TEXT
from student.runtimes.scoring import CompiledScorer
from student.runtimes.session import open_session
from student.runtimes.stages import StagedGraphs
from tests.export.conftest import Compile


def open_(path: Path) -> Any:
    return open_session(path, threads=1)


@pytest.fixture
def pipe(compiled: Path) -> Any:
    return open_pipeline(compiled)


@pytest.fixture(scope="module")
def student(compiled: Path) -> Student:
    return read_student(compiled)


@pytest.fixture(scope="module")
def graphs(compiled: Path, student: Student) -> FusedGraphs:
    folder = compiled / "runtimes" / "onnx-fused-fp32"
    return FusedGraphs(compiled, student, {steps: folder / f"{steps}-steps.onnx" for steps in (4, 2)}, open_)


def test_an_honest_export_passes_at_both_batches(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    parity = image_parity(graphs, pipe, student, 4)
    assert tuple(parity.max_abs) == BATCHES == (1, 7)
    assert 0 < max(parity.max_abs.values()) < FP32.image / 10


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
    expected = "the images of 4 steps differ from torch by .*a fused graph has no stages.* nothing was written"
    with pytest.raises(ExportError, match=expected):
        image_parity(graphs, pipe, student, 4)


def test_a_wrong_sigma_is_caught(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    other = replace(student, sigmas={**student.sigmas, 4: (1.0, 0.75, 0.5, 0.26)})
    with pytest.raises(ExportError, match="images of 4 steps"):
        image_parity(graphs, pipe, other, 4)


def test_a_broken_scorer_is_caught(compiled: Path) -> None:
    ours = CompiledScorer(compiled / "scorers" / "trained.onnx", 1)
    reward = load(compiled.with_name("tiny-scorers") / "trained", compiled / "tokenizer")
    assert max(prove_scorer(ours, reward, [(64, 64)], 0.02).max_abs.values()) < FP32.image
    with torch.no_grad():
        reward.scorer.read[-1].bias += 1e-4
    with pytest.raises(ExportError, match="standardised scores differ"):
        prove_scorer(ours, reward, [(64, 64)], 0.02)


class OneBroken:
    """Graphs of which one picture, that of seed 3, is wrong."""

    def __init__(self, graphs: FusedGraphs) -> None:
        self.tokens, self._graphs = graphs.tokens, graphs

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        images = self._graphs.draw(prompts, seeds, steps)
        for b, seed in enumerate(seeds):
            if seed == 3:
                images[b] = np.clip(images[b] + np.where(images[b] < 0.5, 0.085, -0.085), 0, 1)
        return images


def test_one_broken_picture_among_good_ones_is_caught(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    """Over all eight together it has 30 dB; alone it has 21."""
    broken = OneBroken(graphs)
    found = image_parity(broken, pipe, student, 4, replace(FP16, psnr_db=25.0, picture_db=20.0))
    assert found.picture_db is not None and found.picture_db < 22 and (found.psnr_db or 0) > 29
    with pytest.raises(ExportError, match=r"dB in the worst picture: accepted is 30"):
        image_parity(broken, pipe, student, 4, replace(FP16, psnr_db=25.0))


def test_good_batches_after_a_broken_one_change_nothing(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    """With fifteen prompts there are two batches of seven: seed 3 is in the first of them."""
    with pytest.raises(ExportError, match=r"differ from torch by \S+ at batch 1, 0\.085 at batch 7"):
        image_parity(OneBroken(graphs), pipe, student, 4, prompts=MORE_PROMPTS[:15])


def test_what_is_not_a_number_never_passes() -> None:
    ones = np.ones((2, 3), np.float32)
    assert difference(ones, ones) == 0
    assert difference(ones, ones + 0.5) == 0.5
    for bad in (np.full((2, 3), np.nan, np.float32), np.full((2, 3), np.inf, np.float32), ones[:1]):
        assert difference(ones, bad) == difference(bad, ones) == float("inf")


def test_figures_of_known_differences() -> None:
    ones = np.ones((2, 3), np.float32)
    assert psnr_db([(ones, ones)]) == 200 and relative_norm(ones, ones) == 0
    assert psnr_db([(ones, ones - 0.1)]) == pytest.approx(20.0, abs=1e-5)
    assert psnr_db([(ones, ones), (ones, ones - 0.1)]) == pytest.approx(20 + 10 * np.log10(2), abs=1e-5)
    assert relative_norm(ones * 1.5, ones) == pytest.approx(0.5)
    for bad in (np.full((2, 3), np.nan, np.float32), ones[:1]):
        assert psnr_db([(bad, ones)]) == 0 and relative_norm(bad, ones) == float("inf")


def test_the_paired_change_of_rewards(graphs: FusedGraphs, pipe: Any, student: Student) -> None:
    """A reward that counts how it was called: the first call scores ours, the second torch's."""
    calls: list[int] = []

    def score(images: Any, prompts: Any) -> dict[str, Any]:
        calls.append(len(images))
        gain = np.arange(len(images), dtype=np.float32) if len(calls) == 1 else np.zeros(len(images), np.float32)
        return {"trained": gain / 100}

    parity = image_parity(graphs, pipe, student, 2, FP32, ("a", "b", "c"), score)
    assert calls == [3, 3]
    change = parity.reward["trained"]
    assert (change.prompts, change.mean) == (3, pytest.approx(0.01))
    assert change.error == pytest.approx(0.01 / 3**0.5)

    def worse(images: Any, prompts: Any) -> dict[str, Any]:
        calls.append(0)
        return {"heldout": np.full(len(images), -0.5 * (len(calls) % 2), np.float32)}

    calls.clear()
    with pytest.raises(ExportError, match=r"the reward heldout by -0.500 ± 0.000: accepted is a fall of at most 0.01"):
        image_parity(graphs, pipe, student, 2, FP32, ("a", "b", "c"), worse)


@pytest.fixture(scope="module")
def staged(compile_family: Compile) -> Path:
    return compile_family("flux")


def _stages(staged: Path, **other: Path) -> StagedGraphs:
    files = {stage: staged / "runtimes" / "onnx-staged-fp32" / f"{stage}.onnx" for stage in (TEXT, STEP, DECODER)}
    return StagedGraphs(staged, read_student(staged), files | other, open_)


def _spoil(source: Path, target: Path, operator: str, factor: float) -> None:
    """The graph with the result of its last operator of a kind multiplied."""
    model = ir.load(source)
    node = [node for node in model.graph if node.op_type == operator][-1]
    scale = ir.Value(name="spoilt", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    scale.const_value = ir.tensor(np.float32(factor), name="spoilt")
    model.graph.register_initializer(scale)
    users = list(node.outputs[0].uses())
    product = ir.Node("", "Mul", [node.outputs[0], scale], num_outputs=1, name="spoil")
    product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    product.outputs[0].name = "spoilt.result"
    model.graph.insert_after(node, product)
    for user, index in users:
        user.replace_input_with(index, product.outputs[0])
    save(model, target)


@pytest.mark.parametrize(("stage", "operator"), [("text", "MatMul"), ("step", "MatMul"), ("decoder", "Conv")])
def test_the_stage_that_drifted_is_named(staged: Path, tmp_path: Path, stage: str, operator: str) -> None:
    right = staged / "runtimes" / "onnx-staged-fp32" / f"{stage}.onnx"
    _spoil(right, tmp_path / "spoilt.onnx", operator, 1.5)
    graphs, student, pipe = (
        _stages(staged, **{stage: tmp_path / "spoilt.onnx"}),
        read_student(staged),
        open_pipeline(staged),
    )
    errors = stage_errors(graphs, pipe, student)
    assert {name for name, row in errors.items() if row.relative > FP32.stage} == {stage}
    where = " from step 1 on" if stage == "step" else ""
    with pytest.raises(ExportError, match=f"the stage '{stage}' drifted{where} .relative error"):
        prove(graphs, pipe, student, FP32)


def test_swapped_factors_and_a_wrong_sigma_between_right_stages_are_caught(staged: Path) -> None:
    student, pipe = read_student(staged), open_pipeline(staged)
    other = replace(student, sigmas={**student.sigmas, 3: (1.0, 0.7, 0.3)})
    with pytest.raises(ExportError, match="each stage alone agrees with torch, so the sigmas or the factors between"):
        image_parity(_stages(staged), pipe, other, 3, FP32, stages=stage_errors(_stages(staged), pipe, student))
    _swap_scale_and_shift(pipe)
    with pytest.raises(ExportError, match="the stage 'decoder' drifted"):
        prove(_stages(staged), pipe, student, FP32)


def test_narrow_steps_pass_and_an_overflow_in_float16_does_not(staged: Path, tmp_path: Path) -> None:
    """Wide operators are what keeps float16 finite: without them, and with weights that are large, it is caught."""
    student, pipe = read_student(staged), open_pipeline(staged)
    step = staged / "runtimes" / "onnx-staged-fp32" / "step.onnx"
    for precision, tolerance in (("fp16", FP16), ("bf16", BF16)):
        save(narrow(ir.load(step), precision, round_only=True), tmp_path / f"{precision}.onnx")
        parity, errors = prove(_stages(staged, step=tmp_path / f"{precision}.onnx"), pipe, student, tolerance)
        assert 1e-5 < errors["step"].relative < tolerance.stage
        assert all(one.psnr_db and one.psnr_db > (tolerance.psnr_db or 0) for one in parity.values())
    _spoil(step, tmp_path / "large.onnx", "MatMul", 1e6)
    save(narrow(ir.load(tmp_path / "large.onnx"), "fp16", round_only=True), tmp_path / "overflow.onnx")
    with pytest.raises(ExportError, match="the stage 'step' drifted from step 1 on .relative error inf"):
        prove(_stages(staged, step=tmp_path / "overflow.onnx"), pipe, student, FP16)
