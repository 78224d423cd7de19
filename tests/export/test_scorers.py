"""Every published reward compiles, with its preprocessing and its tokenizer, and scores what torch scores."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from export import scorers
from export.errors import ExportError
from rewards.preprocess import Preprocess
from rewards.registry import find
from rewards.twostage import TwoStage
from student.bundle import Scorer, read_student
from student.files import sha256
from student.runtimes.scoring import CompiledScorer, Scorers, check_scorer, served
from tests import tiny
from tests.rewards import published, small

SIZES = ((64, 64), (48, 96))
PROMPTS = ["a red heart above a blue star", "blue", "", "a red heart " * 30, "blue star", "red"]


def pictures(size: tuple[int, int], count: int = len(PROMPTS)) -> np.ndarray:
    return served(np.random.default_rng(1).random((count, 3, *size), dtype=np.float32))


@pytest.mark.parametrize("name", ["Pick", "Clip", "Hps", "Image", "Aesthetic"])
def test_a_compiled_reward_scores_what_torch_scores(tmp_path: Path, name: str) -> None:
    reward = find(f"tests.rewards.small:{name}")
    assert isinstance(reward, TwoStage)
    path = tmp_path / "scorers" / f"{name}.onnx"
    assert scorers.export_scorer(path, reward, "w", SIZES) < 1e-3
    words = [] if name == "Aesthetic" else [f"{name}.tokenizer.json"]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([f"{name}.json", f"{name}.onnx", *words])
    compiled, spread = CompiledScorer(path, 1), []
    for size in (*SIZES, (31, 200)):  # the last is not one that it was proven with
        images = pictures(size)
        with torch.no_grad():
            theirs = reward.score(torch.from_numpy(images), PROMPTS).numpy()
        np.testing.assert_allclose(compiled(images, PROMPTS), theirs, atol=0.02 * max(1.0, float(np.abs(theirs).max())))
        in_bytes = Preprocess(reward.preprocess.size, reward.preprocess.fit, in_bytes=True)
        reward.preprocess, before = in_bytes, reward.preprocess
        with torch.no_grad():
            exactly = reward.score(torch.from_numpy(images), PROMPTS).numpy()
        reward.preprocess = before
        spread.append(exactly)
        np.testing.assert_allclose(
            compiled(images, PROMPTS), exactly, atol=2e-3 * max(1.0, float(np.abs(exactly).max()))
        )
    assert np.concatenate(spread).std() > 1e-3


@pytest.mark.parametrize("name", ["Pick", "Clip", "Hps", "Image"])
def test_the_tokenizer_of_a_compiled_reward_reads_the_same_ids(tmp_path: Path, name: str) -> None:
    words = find(f"tests.rewards.small:{name}").words
    whole = replace(words, fixed=True)  # of a fixed length, as a compiled one is
    written = scorers.write_tokenizer(words, tmp_path / "t.json")
    rows = Tokenizer.from_file(str(tmp_path / "t.json")).encode_batch(PROMPTS)
    assert (
        [row.ids for row in rows] == whole.read(PROMPTS)[0].tolist() == [r.ids for r in written.encode_batch(PROMPTS)]
    )
    if words.masked:
        assert [row.attention_mask for row in rows] == whole.read(PROMPTS)[1].tolist()


def test_a_compiled_pickscore_is_the_published_call_on_the_served_picture(tmp_path: Path) -> None:
    """PickScore's README on the PNG's own bytes: PIL's resize, centre crop, features, product, temperature."""
    reward, size = small.Pick(), (90, 61)
    scorers.export_scorer(tmp_path / "pick.onnx", reward, "w", SIZES)
    images = pictures(size)
    pils = [Image.fromarray(np.rint(x * 255).astype(np.uint8).transpose(1, 2, 0)) for x in images]
    theirs = published.pick_score(small.clip_model(eos_token_id=2), small.clip_tokenizer(), pils, PROMPTS).numpy()
    np.testing.assert_allclose(CompiledScorer(tmp_path / "pick.onnx", 1)(images, PROMPTS), theirs, atol=1e-3)


def test_the_starter_scorers_see_their_own_size_unchanged(bundle: Path, tmp_path: Path) -> None:
    student = read_student(bundle)
    reward = scorers.open_scorer(bundle, student, "heldout", [bundle.with_name("tiny-scorers")])
    assert isinstance(reward, TwoStage)
    scorers.export_scorer(tmp_path / "heldout.onnx", reward, "w", SIZES, 0.5)
    images = pictures((64, 64), 7)
    with torch.no_grad():
        theirs = reward.score(torch.from_numpy(images), tiny.PROMPTS).numpy()
    np.testing.assert_allclose(CompiledScorer(tmp_path / "heldout.onnx", 1)(images, tiny.PROMPTS), theirs, atol=1e-5)


class Restless(small.Hps):
    """Scores otherwise when it is traced."""

    def judge(self, pixels_BCHW: torch.Tensor, *words_BL: torch.Tensor) -> torch.Tensor:
        score_B = super().judge(pixels_BCHW, *words_BL)
        return score_B + 0.1 if torch.compiler.is_exporting() else score_B


def test_a_scorer_that_fails_its_proof_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the standardised scores differ from torch by .* nothing was written"):
        scorers.export_scorer(tmp_path / "restless.onnx", Restless(), "w", SIZES)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def scored(tmp_path: Path, bundle: Path) -> Path:
    """A bundle that holds a compiled scorer and names one that torch runs."""
    shutil.copytree(bundle, tmp_path / "tiny")
    student = read_student(bundle)
    rows = {
        "pick": Scorer("scorers/pick.onnx", 1.0, 2.0, "heldout", "w", "tests.rewards.small:Pick"),
        "third": Scorer("scorers/third.onnx", 0.5, 0.1, "heldout", "", "tests.rewards.small:EveryThird"),
    }
    (tmp_path / "tiny" / "student.json").unlink()
    from student.bundle import rewrite_student

    rewrite_student(tmp_path / "tiny", replace(student, scorers=rows, reward_reference={}))
    scorers.export_scorer(tmp_path / "tiny" / "scorers" / "pick.onnx", small.Pick(), "w", SIZES)
    return tmp_path / "tiny"


def test_a_scorer_that_raises_on_every_third_picture_leaves_those_out_and_no_other(
    scored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from rewards.serving import open_reward
    from student.reference import failures, verdicts

    student = read_student(scored)
    ours = Scorers(scored, student, 1, open_reward)
    assert set(ours.names) == {"pick", "third"}
    images = pictures((64, 64))
    scores = ours.score(images, PROMPTS)
    expected = (images.mean((1, 2, 3)) - 0.5) / 0.1
    expected[[2, 5]] = np.nan
    np.testing.assert_allclose(scores["third"], expected, atol=1e-4)
    np.testing.assert_allclose(
        scores["pick"], (CompiledScorer(scored / "scorers" / "pick.onnx", 1)(images, PROMPTS) - 1) / 2, atol=1e-5
    )
    assert failures(scores) == {"third": 2} and "the scorer third failed on a picture" in caplog.text
    said = verdicts(student, scores, 4, (64, 64), len(images))
    assert [sorted(verdict.reward) for verdict in said] == [["pick", "third"]] * 2 + [["pick"]] + [
        ["pick", "third"]
    ] * 2 + [["pick"]]


def test_a_reward_that_cannot_be_opened_is_left_out_with_a_line(scored: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str) -> object:
        raise RuntimeError("no such thing")

    ours = Scorers(scored, read_student(scored), 1, refuse)  # type: ignore[arg-type]
    assert ours.names == ("pick",) and "the scorer third (tests.rewards.small:EveryThird) is left out" in caplog.text


def test_many_pictures_are_scored_in_calls_of_a_few(scored: Path) -> None:
    from student.runtimes.scoring import AT_ONCE

    seen: list[int] = []

    def open_counting(name: str) -> object:
        return lambda images, prompts: seen.append(len(images)) or np.zeros(len(images), np.float32)

    Scorers(scored, read_student(scored), 1, open_counting).score(pictures((64, 64), 40), ["a"] * 40)  # type: ignore[arg-type]
    assert seen == [AT_ONCE, AT_ONCE, 40 - 2 * AT_ONCE]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "pick.onnx").write_bytes(b"x"), "does not match its manifest"),
        (lambda folder: (folder / "pick.tokenizer.json").write_text("{}"), "does not match its tokenizer"),
        (lambda folder: (folder / "pick.json").unlink(), "has no manifest"),
        (lambda folder: (folder / "pick.onnx.data").write_bytes(b"x"), "does not match its weights"),
    ],
)
def test_a_scorer_whose_files_do_not_match_is_refused(scored: Path, spoil: object, message: str) -> None:
    check_scorer(scored, read_student(scored), "pick")
    spoil(scored / "scorers")  # type: ignore[operator]
    with pytest.raises(Exception, match=message):
        check_scorer(scored, read_student(scored), "pick")


def test_the_manifest_names_its_files(scored: Path) -> None:
    manifest = json.loads((scored / "scorers" / "pick.json").read_text())
    assert manifest["sha256"] == sha256(scored / "scorers" / "pick.onnx")
    assert manifest["tokenizer_sha256"] == sha256(scored / "scorers" / "pick.tokenizer.json")
    assert manifest["inputs"] == ["images", "rows", "columns", "token_ids"] and manifest["fit"] == "crop"
    assert manifest["parity"]["max_abs"].keys() == {"1", "7"}


def test_a_scorer_is_found_by_its_weights(bundle: Path, tmp_path: Path) -> None:
    student = read_student(bundle)
    real = bundle.with_name("tiny-scorers")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.json").write_text("{}")
    assert scorers.find_scorer(student, "trained", [tmp_path, real]) == real / "trained"
    with pytest.raises(ExportError, match="the scorer 'trained' that tiny was calibrated with is not in .*--scorers"):
        scorers.find_scorer(student, "trained", [tmp_path])
    unsaid = replace(student, scorers={"trained": replace(student.scorers["trained"], source_sha256="")})
    with pytest.raises(ExportError, match="is not in"):
        scorers.find_scorer(unsaid, "trained", [real])
