"""The proof's own arithmetic: what is compared with what, from which figure on it fails, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export import calibrate, verify
from export.calibrate import Seen, calibration_feeds
from export.errors import ExportError
from export.lora import check
from export.qdq import activation_scale
from export.verify import FP32, MORE_PROMPTS, PROMPTS, TOLERANCES, Tolerance, image_parity, prove
from student.families.family import Condition
from student.noise import noise
from student.runtimes.manifest import Change, Parity, StageError
from student.runtimes.stages import StagedGraphs
from tests import tiny

STUDENT = tiny.student({})
LIMITS = Tolerance(stage=0.1, image=0.5, psnr_db=30.0, reward=0.05, picture_db=20.0)
GOOD = Parity({1: 0.1, 7: 0.2}, 0.5, 35.0, 30.0, {"a": Change(0.0, 0.01, 8)}, 25.0, 20.0)
NAN = float("nan")


def test_the_proofs_prompts_are_many_and_each_once() -> None:
    assert len(set(MORE_PROMPTS)) == len(MORE_PROMPTS) == 32 and MORE_PROMPTS[:8] == PROMPTS and "" in PROMPTS


def test_tolerances_grow_with_what_a_type_can_hold() -> None:
    """float32 alone has no lower limit for a picture: its values may differ by a thousandth at most."""
    assert list(TOLERANCES) == ["fp32", "fp16", "bf16", "int8", "fp8"]
    for less, more in zip(TOLERANCES.values(), list(TOLERANCES.values())[1:], strict=False):
        assert less.stage <= more.stage and less.image <= more.image and less.reward <= more.reward
    assert (FP32.psnr_db, FP32.picture_db, FP32.score) == (None, None, 1e-3)
    assert [(one.psnr_db, one.picture_db) for one in list(TOLERANCES.values())[1:]] == [
        (40.0, 30.0), (30.0, 20.0), (25.0, 16.0), (25.0, 16.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "batches"),
    [
        (1, [(0, 1)]),
        (3, [(0, 1), (1, 3)]),
        (8, [(0, 1), (1, 8)]),
        (15, [(0, 1), (1, 8), (8, 15)]),
        (9, [(0, 1), (1, 8), (8, 9)]),
    ],
)
def test_pictures_are_drawn_alone_first_and_then_by_seven(count: int, batches: list[tuple[int, int]]) -> None:
    assert verify._batches(count) == batches


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"max_abs": {1: 0.5, 7: 0.5}, "psnr_db": 30.0, "picture_db": 20.0, "reward": {"a": Change(-0.05, 9, 8)}}, ""),
        ({"reward": {"a": Change(9.0, 0.0, 8)}}, ""),  # a rise is none of the proof's concern
        ({"max_abs": {1: 0.1, 7: 0.51}}, "differ from torch by 0.1 at batch 1, 0.51 at batch 7: accepted is 0.5"),
        ({"max_abs": {1: NAN}}, "differ from torch by nan at batch 1: accepted is 0.5"),
        ({"psnr_db": 29.94}, "have a PSNR of 29.9 dB against torch's: accepted is 30 or more"),
        ({"psnr_db": NAN}, "have a PSNR of nan dB against torch's: accepted is 30 or more"),
        ({"picture_db": 19.9}, "have a PSNR of 19.9 dB in the worst picture: accepted is 20 or more"),
        (
            {"reward": {"a": Change(0.0, 0.0, 8), "b": Change(-0.051, 0.01, 8)}},
            "change the reward b by -0.051 ± 0.010: accepted is a fall of at most 0.05",
        ),
        (
            {"reward": {"a": Change(NAN, 0.0, 8)}},
            "change the reward a by +nan ± 0.000: accepted is a fall of at most 0.05",
        ),
    ],
)
def test_a_proof_fails_from_the_first_figure_beyond_its_limit_on(change: dict[str, Any], said: str) -> None:
    assert verify._failure(replace(GOOD, **change), LIMITS) == said


OK, BAD = StageError(0.05, 1.0, (0.01, 0.05)), StageError(0.3, 1.0, (0.05, 0.2, 0.3))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"text": BAD, "step": BAD}, "the stage 'text' drifted from step 2 on (relative error 0.3, accepted is 0.1)"),
        (
            {"text": OK, "decoder": BAD, "step": BAD},
            "the stage 'step' drifted from step 2 on (relative error 0.3, accepted is 0.1)",
        ),
        (
            {"step": OK, "step_2": BAD},
            "the stage 'step_2' drifted from step 4 on (relative error 0.3, accepted is 0.1)",
        ),
        ({"step_2": BAD}, "the stage 'step_2' drifted from step 2 on (relative error 0.3, accepted is 0.1)"),
        ({"decoder": replace(BAD, per_step=())}, "the stage 'decoder' drifted (relative error 0.3, accepted is 0.1)"),
        (
            {"step": StageError(NAN, 1.0, (0.01, NAN))},
            "the stage 'step' drifted from step 2 on (relative error nan, accepted is 0.1)",
        ),
        (
            {"text": OK, "step": replace(OK, relative=0.06)},
            "the stage 'step' is the farthest from torch (relative error 0.06)",
        ),
        ({"step": replace(OK, relative=0.1)}, "the stage 'step' is the farthest from torch (relative error 0.1)"),
        ({}, ""),
    ],
)
def test_the_first_stage_that_drifted_is_named_with_the_step(stages: dict[str, StageError], said: str) -> None:
    assert verify._drift(stages, LIMITS) == said


class Drawn:
    """Graphs whose picture is its seed, of which those of ``wrong`` are off by as much."""

    def __init__(self, **wrong: float) -> None:
        self.wrong, self.asked = {int(seed[1:]): by for seed, by in wrong.items()}, list[Any]()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        self.asked.append((list(prompts), list(seeds), steps))
        return np.array([0.01 * seed + self.wrong.get(seed, 0.0) for seed in seeds], np.float32).reshape(-1, 1, 1, 1)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What diffusers' own loop draws."""
    found = Drawn()
    monkeypatch.setattr(verify, "reproduce", lambda pipe, student, *call: found.draw(*call))
    return found


def test_both_sides_draw_the_same_prompts_from_the_same_seeds(theirs: Drawn) -> None:
    ours, prompts = Drawn(_3=0.1, _9=0.001), MORE_PROMPTS[:15]
    scored: list[Any] = []

    def score(images: Any, texts: Sequence[str]) -> Any:
        scored.append(list(texts))
        return {"a": images.ravel(), "never": np.full(len(images), np.nan, np.float32)}

    found = image_parity(ours, object(), STUDENT, 4, replace(LIMITS, psnr_db=None, picture_db=None), prompts, score)  # type: ignore[arg-type]
    assert ours.asked == theirs.asked == [
        (list(prompts[first:last]), list(range(first, last)), 4) for first, last in ((0, 1), (1, 8), (8, 15))
    ]  # fmt: skip
    assert found.max_abs == {1: 0.0, 7: pytest.approx(0.1, abs=1e-6)}, "the worst of all batches of a size"
    assert found.psnr_db == pytest.approx(-10 * np.log10((0.01 + 1e-6) / 15), abs=1e-3)
    assert found.picture_db == pytest.approx(20, abs=1e-3)
    assert scored == [list(prompts)] * 2 and set(found.reward) == {"a"}
    changes = np.zeros(15)
    changes[[3, 9]] = 0.1, 0.001
    assert found.reward["a"].mean == pytest.approx(changes.mean(), rel=1e-4)
    assert (
        found.reward["a"].error == pytest.approx(changes.std(ddof=1) / 15**0.5, rel=1e-4)
        and found.reward["a"].prompts == 15
    )


def test_a_reward_is_compared_over_the_pictures_that_both_sides_scored(theirs: Drawn) -> None:
    calls: list[int] = []

    def score(images: Any, texts: Sequence[str]) -> Any:
        calls.append(0)
        found = np.arange(len(images), dtype=np.float32) * (len(calls) == 1)
        found[len(calls)] = np.nan
        return {"a": found, "one": np.where(np.arange(len(images)) == 0, np.float32(0.5), np.float32(np.nan))}

    found = image_parity(Drawn(), object(), STUDENT, 4, LIMITS, PROMPTS, score).reward  # type: ignore[arg-type]
    assert (found["a"].prompts, found["a"].mean) == (6, pytest.approx((0 + 3 + 4 + 5 + 6 + 7) / 6))
    assert found["one"] == Change(0.0, 0.0, 1)


def test_every_step_count_is_proven_and_a_stage_that_drifted_fails_though_the_pictures_agree(
    theirs: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Staged(StagedGraphs):
        def __init__(self) -> None:
            self.drawn = Drawn()

        def draw(self, *call: Any) -> Any:
            return self.drawn.draw(*call)

    errors = {"text": OK, "step": OK}
    monkeypatch.setattr(verify, "stage_errors", lambda graphs, pipe, student: errors)
    parity, stages = prove(Staged(), object(), STUDENT, LIMITS)
    assert list(parity) == [4, 2] and stages is errors
    assert {steps for _, _, steps in theirs.asked} == {4, 2}
    for bad in (replace(OK, relative=0.11), replace(OK, relative=float("inf"))):
        errors["decoder"] = bad
        with pytest.raises(
            ExportError, match="the stage 'decoder' drifted .*, though the pictures agree; nothing was wr"
        ):
            prove(Staged(), object(), STUDENT, LIMITS)
    errors["decoder"] = replace(OK, relative=0.1)
    prove(Staged(), object(), STUDENT, LIMITS)


def test_calibration_follows_torchs_own_path_at_every_step_count() -> None:
    """The answer key is the loop by hand, with v = x + sigma + the prompt's first id."""

    class Model:
        def encode_ids(self, *ids: torch.Tensor) -> Condition:
            return Condition(ids[0].float()[..., None], ids[1].float())

        def velocity(self, x: torch.Tensor, sigma: float, condition: Condition) -> torch.Tensor:
            return x + sigma + condition.tokens_BLE[:, 0, 0].view(-1, 1, 1, 1)

    prompts = tuple("abcdef")
    tokens: Any = SimpleNamespace(
        encode=lambda texts: [
            np.array([[ord(text) / 100, 2] for text in texts]),
            np.array([[ord(text)] for text in texts]),
        ]
    )
    request: Any = SimpleNamespace(student=STUDENT, prompts=prompts)
    feeds = list(calibration_feeds(Model(), request, tokens))  # type: ignore[arg-type]
    expected = []
    for first, last in ((0, 4), (4, 6)):
        ids = np.array([ord(text) / 100 for text in prompts[first:last]], np.float32)
        for steps in STUDENT.steps:
            x, sigmas = noise(range(1000 + first, 1000 + last), STUDENT.latents.shape), STUDENT.sigmas[steps]
            for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
                expected.append((x, sigma, ids))
                x = x + (x + np.float32(sigma) + ids[:, None, None, None]) * np.float32(following - sigma)
    assert len(feeds) == len(expected) == 2 * (4 + 2)
    for feed, (x, sigma, ids) in zip(feeds, expected, strict=True):
        assert feed.keys() == {"latents", "sigma", "tokens", "pooled"} and feed["sigma"].dtype == np.float32
        np.testing.assert_allclose(feed["latents"], x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(feed["sigma"], np.full(len(ids), sigma), rtol=1e-6)
        np.testing.assert_allclose(feed["tokens"][:, 0, 0], ids, rtol=1e-6)
        np.testing.assert_array_equal(feed["pooled"][:, 0], np.round(ids * 100))


def test_a_range_is_of_all_values_and_a_cut_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SAMPLES", 100)
    seen = Seen()
    for part in (np.linspace(0, 50, 1001), np.linspace(50, 100, 999)):
        seen.add(part.astype(np.float32).reshape(1, -1))
    assert seen.bounds(0) == (0.0, 100.0) and [len(part) for part in seen.samples] == [91, 100]
    low, high = seen.bounds(10)
    assert low == 0.0 and high == pytest.approx(90, abs=1.5), "zero is always inside"
    positive = Seen()
    positive.add(np.array([3.0, 5.0], np.float32))
    assert positive.bounds(0) == (0.0, 5.0)
    negative = Seen()
    negative.add(np.array([-4.0, -1.0], np.float32))
    assert negative.bounds(0) == (-4.0, 0.0) and negative.bounds(10) == (pytest.approx(-3.7, abs=1e-6), 0.0)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-51.0, 204.0, 1.0, 51),
        (0.0, 0.0, 2.0**-40, 0),
        (-1.0, 1.0, 2 / 255, 128),
    ],
)
def test_int8_spans_exactly_the_range_with_a_zero_of_its_own(low: float, high: float, scale: float, zero: int) -> None:
    found = activation_scale(Seen(low, high), "int8")
    assert found.scale == pytest.approx(scale, rel=1e-6) and found.zero in (zero, zero - (low == -1.0))


@pytest.mark.parametrize(("low", "high", "most"), [(-896.0, 448.0, 896.0), (-1.0, 448.0, 448.0), (0.0, 0.0, 2.0**-40)])
def test_fp8_is_symmetric_up_to_the_largest(low: float, high: float, most: float) -> None:
    found = activation_scale(Seen(low, high), "fp8")
    assert found.scale == pytest.approx(most / 448, rel=4e-3) and found.zero == 0


def lora(**rank: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A pair of factors for each layer, of these ranks; the layers are 4 in, 6 out."""
    return {
        f"transformer.{layer}.lora_{side}.weight": torch.zeros(*((ranks[0], 4) if side == "A" else (6, ranks[1])))
        for layer, ranks in rank.items()
        for side in "AB"
    }


def test_a_loras_every_key_must_have_its_layer_its_size_and_its_counterpart() -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(4, 6), "norm": torch.nn.Dropout()})
    alpha = {"transformer.a.alpha": torch.tensor(2.0)}
    assert check(network, lora(a=(2, 2), b=(3, 3)) | alpha, "x") == 2
    pair = lora(a=(2, 2))
    one, other = pair
    for state, said in (
        (
            pair | {"text_encoder.a.lora_A.weight": pair[one]},
            "has the key text_encoder.a.lora_A.weight: accepted are chan",
        ),
        (
            pair | {"transformer.a.weight": pair[one]},
            "has the key transformer.a.weight: accepted are changes of the tra",
        ),
        (lora(c=(2, 2)), "has the key transformer.c.lora_A.weight, but the model has no layer c$"),
        (lora(norm=(2, 2)), "has the key transformer.norm.lora_A.weight, but the model has no layer norm$"),
        ({one: torch.zeros(2, 3), other: pair[other]}, f"is for another model: {one} has size 3 where this one has 4$"),
        ({one: torch.zeros(2, 5), other: pair[other]}, f"is for another model: {one} has size 5 where this one has 4$"),
        ({one: pair[one], other: torch.zeros(7, 2)}, f"is for another model: {other} has size 7 where this one has 6$"),
        (lora(a=(2, 3)), f"is broken: {one} has rank 2, and {other} has 3$"),
        ({one: pair[one]}, f"has the key {one}, but no {other}$"),
        (alpha, "changes no layer of the transformer$"),
        ({}, "changes no layer of the transformer$"),
    ):
        with pytest.raises(ExportError, match=f"^the LoRA x {said}"):
            check(network, state, "x")


def test_nothing_is_left_of_a_graph_that_was_opened_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work.onnx"

    def save(model: Any, path: Path) -> None:
        path.write_bytes(b"graph")
        path.with_name("work.onnx.data").write_bytes(b"weights")

    monkeypatch.setattr(calibrate, "save", save)
    monkeypatch.setattr(calibrate, "open_session", lambda path, threads: (path.read_bytes(), threads))
    assert calibrate.opened(None, work) == (b"graph", 1) and list(tmp_path.iterdir()) == []  # type: ignore[arg-type, comparison-overlap]

    def fails(path: Path, threads: int) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(calibrate, "open_session", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        calibrate.opened(None, work)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
