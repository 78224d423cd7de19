"""Any torch module of (images, token ids) -> score can be a scorer; here one whose score is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import scorers
from export.errors import ExportError
from student.bundle import read_student, sha256
from student.runtimes.scoring import Scorers
from student.tokens import PromptTokens
from tests import tiny


class Redness(nn.Module):
    """Mean of the red channel, plus the number of tokens that are words."""

    def forward(self, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
        return images_BCHW[:, 0].mean(dim=(1, 2)) + (ids_BL > 1).sum(dim=1).float()


@pytest.fixture
def standing_in(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with nothing but what scoring reads, and the stand-in in place of the real scorers."""
    monkeypatch.setattr(scorers.shapes, "load", lambda path: Redness())
    for folder in ("tokenizer", "tokenizer_2"):
        (tmp_path / folder).symlink_to(bundle / folder)
    return tmp_path


def test_a_stand_in_is_compiled_and_scores_as_known(bundle: Path, standing_in: Path) -> None:
    student = read_student(bundle)
    assert scorers.export_scorer(standing_in, student, "heldout", Path("anywhere")) < 1e-5
    manifest = json.loads((standing_in / "scorers" / "heldout.json").read_text())
    assert manifest["sha256"] == sha256(standing_in / "scorers" / "heldout.onnx")
    assert manifest["parity"]["max_abs"].keys() == {"1", "7"}
    assert sorted(path.name for path in (standing_in / "scorers").iterdir()) == ["heldout.json", "heldout.onnx"]
    images = np.zeros((2, 3, 64, 64), np.float32)
    images[1, 0] = 0.5
    ours = Scorers(standing_in, student, PromptTokens(standing_in, tiny.MAX_TOKENS), threads=1)
    scores = ours.score(images, ["a red heart", "star"])
    assert scores.keys() == {"heldout"}
    np.testing.assert_allclose(scores["heldout"], [(3 - -0.3) / 0.5, (1.5 - -0.3) / 0.5], rtol=1e-5)


def test_a_scorer_that_fails_its_proof_is_not_written(
    bundle: Path, standing_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restless(Redness):
        calls = 0

        def forward(self, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
            score_B = super().forward(images_BCHW, ids_BL)
            return score_B if torch.compiler.is_exporting() else score_B + 0.01

    monkeypatch.setattr(scorers.shapes, "load", lambda path: Restless())
    with pytest.raises(ExportError, match="the standardised scores differ from torch by .* nothing was written"):
        scorers.export_scorer(standing_in, read_student(bundle), "heldout", Path("anywhere"))
    assert list((standing_in / "scorers").iterdir()) == []


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
