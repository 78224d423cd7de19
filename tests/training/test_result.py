"""What student.json says of a run, worked out by hand from figures that are known."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rewards.weighted import Calibration, Term, Weighted
from student.bundle import ImageSize, Latents
from training import result
from training.evaluate import Evaluation
from training.result import _fit_fp16, _named, manifest

REWARD: Any = SimpleNamespace()


def weighted(*terms: Term) -> Weighted:
    return Weighted(terms)


def row(label: str, nfe: int, raw: float, **fields: Any) -> Evaluation:
    """Three prompts whose raw scores are ``raw`` - 1, ``raw`` and ``raw`` + 1."""
    scores = {name: [raw - 1.0, raw, raw + 1.0] for name in ("taste", "words", "other")}
    varied = {name: [[raw, raw + 2.0], [raw, raw + 2.0]] for name in scores}
    usual: dict[str, Any] = {"judge": {"right": [1.0, 0.0, 1.0]}, "diversity": [2.0, 4.0], "varied": varied}
    return Evaluation(label, nfe, 1.0, scores, **{**usual, **fields})


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    (tmp_path / "folder").mkdir()
    config = SimpleNamespace(model=str(tmp_path), student=SimpleNamespace(id="cats", version="3", nfe=(2, 4)))
    model = SimpleNamespace(
        name="a-family", max_tokens=77, baked={"guidance": 3.5}, scheduler_config={},
        sigmas=lambda nfe, shape: (tuple(1 - k / nfe for k in range(nfe)), shape)[0],
    )  # fmt: skip
    rewards = {
        "trained": weighted(
            Term("taste", REWARD, 2.0, Calibration(1.0, 0.5), "aesthetic", "its digest"),
            Term("other", REWARD, 1.0, Calibration(1.0, 0.5), f"shapes:{tmp_path / 'folder'}"),
        ),
        "heldout": weighted(Term("words", REWARD, 1.0, Calibration(0.0, 2.0), "hps", "another")),
    }
    return SimpleNamespace(
        config=config, model=model, rewards=rewards, latents=Latents(4, 4, 4, 1, 1.0, 0.0), image=ImageSize(32, 32),
        prompts=SimpleNamespace(test=["a", "b", "c"]),
    )  # fmt: skip


TABLE = (row("teacher", 28, 9.0), row("student", 2, 2.0), row("student", 4, 3.0))


def test_a_student_is_what_it_was_configured_and_trained_to_be(setup: Any) -> None:
    found = manifest(setup, TABLE, 40)
    assert (found.id, found.version, found.family, found.steps) == ("cats", "3", "a-family", (2, 4))
    assert found.sigmas == {2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)} and found.chosen_at == 40
    assert (found.max_tokens, found.baked, found.schedule) == (77, {"guidance": 3.5}, None)
    assert (found.latents, found.image) == (setup.latents, setup.image)


def test_its_scorers_are_those_of_both_roles_with_their_calibration(setup: Any) -> None:
    found = {name: asdict(scorer) for name, scorer in manifest(setup, TABLE, 40).scorers.items()}
    assert found == {
        "taste": {"file": "scorers/taste.onnx", "mean": 1.0, "std": 0.5, "role": "trained",
                  "source_sha256": "its digest", "reward": "aesthetic"},
        "other": {"file": "scorers/other.onnx", "mean": 1.0, "std": 0.5, "role": "trained",
                  "source_sha256": "", "reward": None},
        "words": {"file": "scorers/words.onnx", "mean": 0.0, "std": 2.0, "role": "heldout",
                  "source_sha256": "another", "reward": "hps"},
    }  # fmt: skip


def test_its_reference_is_of_its_own_pictures_by_step_count_and_the_first_stands_for_all(setup: Any) -> None:
    found = manifest(setup, TABLE, 40).reward_reference
    assert set(found) == {"taste", "other", "words"}
    taste = found["taste"]
    assert taste.at is not None and set(taste.at) == {"2", "4"}
    # Raw scores 1, 2, 3 and 2, 3, 4 with mean 1 and standard deviation 0.5: 0, 2, 4 and 2, 4, 6.
    assert (taste.mean, taste.at["2"].mean, taste.at["4"].mean) == (2.0, 2.0, 4.0)
    assert taste.std == pytest.approx(2.0) and taste.count == 3 and taste.percentiles["50"] == 2.0
    assert found["words"].mean == 1.0


def test_how_scores_vary_within_a_prompt_is_told_by_step_count(setup: Any) -> None:
    within = manifest(setup, TABLE, 40).within_prompt
    assert within is not None and set(within) == {"2", "4"}
    four = within["4"]
    # Two pictures apart by 2 raw are apart by 4 of taste's and 1 of words' standard deviations.
    assert (four.prompts, four.seeds) == (2, 2)
    assert four.spread["taste"] == pytest.approx(math.sqrt(8), abs=1e-3)
    assert four.spread["words"] == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert four.gain["taste"] == pytest.approx([0.0, 2.0], abs=1e-3)
    assert four.correlation["taste words"] == pytest.approx(1.0, abs=1e-3)


def test_without_several_pictures_of_a_prompt_nothing_is_told_of_them(setup: Any) -> None:
    alone = tuple(row("student", nfe, 2.0, diversity=[2.0]) for nfe in (2, 4))
    assert manifest(setup, alone, 40).within_prompt is None


def test_the_table_has_every_rows_figures_with_their_errors(setup: Any) -> None:
    rows = manifest(setup, (*TABLE, row("student", 8, 1.0, diversities={"on dino": [1.0, 3.0]})), 40).evaluation
    assert [(one["model"], one["nfe"], one["guidance"], one["prompts"]) for one in rows] == [
        ("teacher", 28, 1.0, 3), ("student", 2, 1.0, 3), ("student", 4, 1.0, 3), ("student", 8, 1.0, 3),
    ]  # fmt: skip
    student = rows[1]
    # Two terms of standardised 0, 2, 4: twice the first and once the other are 0, 6, 12.
    assert student["trained"] == pytest.approx({"mean": 6.0, "error": 6 / math.sqrt(3)})
    assert student["heldout"]["mean"] == 1.0 and student["judge_right"]["mean"] == pytest.approx(2 / 3)
    assert student["diversity"] == pytest.approx({"mean": 3.0, "error": 1.0})
    assert rows[3]["on dino"]["mean"] == 2.0 and "on dino" not in student


def test_a_scorers_folder_is_not_a_name_to_serve_by(tmp_path: Path) -> None:
    assert _named("hps") == "hps" and _named("shapes:judge") == "shapes:judge"
    assert _named(str(tmp_path)) is None and _named(f"shapes:{tmp_path}") is None


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (-65504.0, True), (65600.0, False), (-7e4, False)])
def test_weights_are_halved_only_where_each_is_in_the_range(value: float, fits: bool) -> None:
    network, other = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, value]]))
    parts = {"tokenizer": object(), "text_encoder": other, "transformer": network, "none": None}
    assert _fit_fp16(SimpleNamespace(components=parts)) is fits


def test_an_error_counts_a_prompt_that_comes_twice_once(setup: Any) -> None:
    """Values 0, 6, 12 of the prompts a, b, a: their deviations -6 and 6 are those of one prompt, and cancel."""
    setup.prompts.test = ["a", "b", "a"]
    student = manifest(setup, TABLE, 40).evaluation[1]
    assert student["trained"] == pytest.approx({"mean": 6.0, "error": 0.0})
    # 1, 0, 1 around 2/3: deviations of 2/3 and -2/3, each of a prompt.
    assert student["judge_right"]["error"] == pytest.approx(math.sqrt(2 * 2 * (2 / 3) ** 2) / 3)
    assert student["diversity"]["error"] == pytest.approx(1.0), "of the first two prompts"


def test_what_is_written_beside_the_pipeline_is_the_runs_own(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of its world to prove exports with, its pictures, curves and alarms, and its teacher's terms."""
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    (out / "run" / "alarms.txt").write_text("one\ntwo\n")
    (tmp_path / "LICENSE.md").write_text("no trade")
    setup.prompts.calibration = [f"prompt {k}" for k in range(40)]
    done: list[Any] = []
    terms = SimpleNamespace(name="the teacher", terms=tmp_path / "LICENSE.md")
    monkeypatch.setattr(result, "origin", lambda model: (done.append(("origin", model)), terms)[1])
    monkeypatch.setattr(result, "read_log", lambda path: ("log", path))
    monkeypatch.setattr(result, "read_index", lambda path: ("index", path))
    monkeypatch.setattr(result.figures, "grid", lambda *given: done.append(("grid", *given)))
    monkeypatch.setattr(result.figures, "curves", lambda *given: done.append(("curves", *given)))
    monkeypatch.setattr(result, "write_student", lambda folder, made: (done.append(("student", folder)), made)[1])
    monkeypatch.setattr(result, "card", lambda *given: (done.append(("card", *given)), "its card")[1])
    pictures: Any = {"teacher, 28 steps": "pictures"}
    student = result.write(out, setup, TABLE, pictures, 40)
    assert student == manifest(setup, TABLE, 40) and student.teacher == "the teacher"
    assert (out / "calibration.txt").read_text().splitlines() == [f"prompt {k}" for k in range(32)]
    assert (out / "LICENSE.md").read_text() == "no trade" and (out / "README.md").read_text() == "its card"
    calls = [call for call in done if call[0] != "origin"]
    assert calls == [
        ("student", out),
        ("grid", pictures, out / "grid.png"),
        ("curves", ("log", out / "run" / "log.jsonl"), out / "curves.png"),
        ("card", student, setup.config, TABLE, setup.rewards, terms, ("index", out), ["one", "two"], ["a", "b", "c"]),
    ]
    (out / "run" / "alarms.txt").unlink()
    (out / "LICENSE.md").unlink()
    terms.terms = None
    result.write(out, setup, TABLE, pictures, 40)
    assert done[-1][-2] == [] and not (out / "LICENSE.md").exists()


@pytest.mark.parametrize(
    ("weights", "fits", "stored"), [("fp32", True, torch.float16), ("fp32", False, None), ("bf16", True, None)]
)
def test_a_pipeline_is_kept_in_the_types_that_it_was_evaluated_in(
    weights: str, fits: bool, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 as fp16 where every weight has room there; bf16 as it is, but for what its family keeps in fp32."""
    done: list[Any] = []
    monkeypatch.setattr(result, "networks", lambda transformer: {"transformer": transformer})
    monkeypatch.setattr(result, "open_pipeline", lambda *given, **more: (done.append(("open", given, more)), "pipe")[1])
    monkeypatch.setattr(result, "_fit_fp16", lambda pipe: fits)
    monkeypatch.setattr(result, "shift_no_more", lambda pipe: done.append(("shift", pipe)))
    monkeypatch.setattr(result, "save_pipeline", lambda *given: done.append(("save", *given)))
    model: Any = SimpleNamespace(transformer="trained", in_float32=("vae",))
    result.save(Path("out"), "teacher", model, weights)
    types = ({"default": torch.bfloat16, "vae": torch.float32},) if weights == "bf16" else ()
    assert done == [
        ("open", ("teacher", *types), {"local_files_only": False, "transformer": "trained"}),
        ("shift", "pipe"),
        ("save", "pipe", Path("out"), stored),
    ]
