"""The stages of the starter world's pretraining: which run, on what, in which order, and what their cards say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from rewards import shapes as rewards
from training import pretrain
from training.config import changed
from training.evaluate import Evaluation
from training.pretrain import STAGES
from training.shapes import pretraining, teacher_card, vocabulary
from training.shapes.preset import ShapesPretraining
from training.shapes.pretraining import run, shortened
from training.shapes.teacher import Parts

CONFIG = changed(ShapesPretraining(), {"guidance": 1.5, "evaluate_prompts": 7})
# As docs/experiments.md and the shipped models' cards tell them: what a whole pretraining is made of.
DEFAULTS = {
    "autoencoder": {"steps": 7000, "batch": 16, "lr": 2e-3, "width": 32, "latent_channels": 16, "latent_noise": 0.5,
                    "moment_weight": 1e-2, "seed": 101, "save_every": 500},
    "trained": {"name": "trained", "kind": "query", "half": 0, "seed": 211, "width": 96, "steps": 4500, "batch": 32,
                "lr": 1e-3, "wrong_captions": 8, "save_every": 250},
    "heldout": {"name": "heldout", "kind": "clip", "half": 1, "seed": 223, "width": 96, "steps": 3000, "batch": 32,
                "lr": 1e-3, "wrong_captions": 8, "save_every": 250},
    "teacher": {"steps": 16000, "batch": 64, "lr": 1e-3, "muon_lr": 0.0, "width": 192, "double_blocks": 1,
                "single_blocks": 5, "caption_dropout": 0.1, "sigma_shift": 0.25, "ema": 0.999, "cached_batches": 2500,
                "singles": 0.7, "spread": 0.5, "start": "", "swapped": 0.0, "seed": 307, "save_every": 250},
    "decoder": {"steps": 2000, "batch": 16, "lr": 1.2e-3, "latent_noise": 0.35, "seed": 777, "save_every": 250},
    "failures": {"pictures": 3072, "models": ["models/shapes-teacher"], "singles": 0.6, "seed": 51},
    "refine": {"steps": 800, "scenes": 16, "pictures": 32, "generated": 1.0, "lr": 6e-4, "seed": 5, "save_every": 100},
    "students": {"pictures": 3072, "models": ["models/shapes-teacher", "models/shapes"], "singles": 0.6, "seed": 53},
    "reader": {"name": "reported", "steps": 1500, "scenes": 48, "pictures": 24, "width": 96, "lr": 1.5e-3, "seed": 239,
               "save_every": 250},
    "guidance": 2.5,
    "evaluate_prompts": 512,
}  # fmt: skip


def test_a_whole_pretraining_is_what_it_was() -> None:
    assert json.loads(json.dumps(asdict(ShapesPretraining()))) == DEFAULTS


def test_a_short_one_differs_in_its_lengths_alone() -> None:
    whole, short = (json.loads(json.dumps(asdict(one))) for one in (CONFIG, shortened(CONFIG, 3)))
    shorter = {
        **{f"{part}.steps": 3 for part in ("autoencoder", "trained", "heldout", "teacher", "decoder", "refine")},
        **{f"{part}.batch": 4 for part in ("trained", "heldout", "teacher", "decoder")},
        **{f"{part}.scenes": 2 for part in ("refine", "reader")},
        **{f"{part}.pictures": 4 for part in ("refine", "reader")},
        **{"reader.steps": 3, "failures.pictures": 64, "students.pictures": 64},
    }  # fmt: skip
    for key, value in shorter.items():
        part, name = key.split(".")
        whole[part][name] = value
    assert short == whole


class Seen:
    """Everything that the stages do, in order, without doing it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        made = {
            "autoencoder.train": "autoencoder", "autoencoder.psnr_db": 31.5, "scorer.train": "scorer",
            "scorer.accuracy": {"all": 0.75}, "teacher.train": Parts(torch.nn.Linear(2, 3), None, None),  # type: ignore[arg-type]
            "sharpen.train": "sharpened", "failures.draw": None, "failures.read": "drawn", "refine.train": "refined",
            "reader.train": "read", "write_scorer": None, "write_teacher": None, "_write_decoder": None,
            "_measure_teacher": {"teacher 50 steps right": 0.5},
        }  # fmt: skip
        for name, answer in made.items():
            owner, _, attribute = name.rpartition(".")
            patch.setattr(getattr(pretraining, owner) if owner else pretraining, attribute, self.note(name, answer))
        patch.setattr(pretraining, "AutoencoderTiny", SimpleNamespace(from_pretrained=self.note("open", "opened")))

    def note(self, name: str, answer: Any) -> Any:
        def called(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return answer

        return called


RUN, MODELS = Path("run"), Path("models")
PLACE, SCORERS = MODELS / "shapes-teacher", MODELS / "shapes-scorers"
ACCURACY = {"all": 0.75}


def scorer_stage(name: str) -> list[tuple[str, tuple[Any, ...]]]:
    training = getattr(CONFIG, name)
    return [
        ("scorer.train", (training, RUN)),
        ("scorer.accuracy", ("scorer",)),
        ("write_scorer", ("scorer", training, ACCURACY, SCORERS / name)),
    ]


def refined(name: str) -> list[tuple[str, tuple[Any, ...]]]:
    training = getattr(CONFIG, name)
    return [
        ("refine.train", (CONFIG.refine, training, SCORERS / name, "opened", "drawn", RUN)),
        ("scorer.accuracy", ("refined",)),
        ("write_scorer", ("refined", training, ACCURACY, SCORERS / name)),
    ]


MEASURED = [("_measure_teacher", (CONFIG, MODELS))]
EXPECTED: dict[str, tuple[list[tuple[str, tuple[Any, ...]]], dict[str, float]]] = {
    "autoencoder": (
        [("autoencoder.train", (CONFIG.autoencoder, RUN)), ("autoencoder.psnr_db", ("autoencoder",))],
        {"autoencoder psnr_db": 31.5},
    ),
    "trained": (scorer_stage("trained"), {"trained all": 0.75}),
    "heldout": (scorer_stage("heldout"), {"heldout all": 0.75}),
    "teacher": (
        [
            ("teacher.train", (CONFIG.teacher, RUN)),
            ("open", (RUN / "autoencoder",)),
            ("write_teacher", (..., "opened", PLACE)),
        ],
        {"teacher parameters": 9.0},
    ),
    "decoder": (
        [
            ("sharpen.train", (CONFIG.decoder, PLACE / "vae", RUN)),
            ("autoencoder.psnr_db", ("sharpened",)),
            ("_write_decoder", ("sharpened", PLACE)),
        ],
        {"decoder psnr_db": 31.5},
    ),
    "failures": ([("failures.draw", (CONFIG.failures, RUN / "failures.pt"))], {}),
    "scorers": (
        [
            ("open", (PLACE / "vae",)),
            ("failures.read", ([RUN / "failures.pt"],)),
            *refined("trained"),
            *refined("heldout"),
        ],
        {},
    ),
    "reader": (
        [
            ("failures.draw", (CONFIG.students, RUN / "failures-students.pt")),
            ("open", (PLACE / "vae",)),
            ("failures.read", ([RUN / "failures-students.pt"],)),
            ("reader.train", (CONFIG.reader, "opened", "drawn", RUN)),
            ("scorer.accuracy", ("read",)),
            ("write_scorer", ("read", CONFIG.reader, ACCURACY, SCORERS / "reported")),
        ],
        {},
    ),
}  # fmt: skip
MEASURES = ("teacher", "scorers")


@pytest.mark.parametrize("chosen", [*((name,) for name in STAGES), STAGES, STAGES[::-1], ()])
def test_a_stage_is_given_what_the_stages_before_it_made(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of STAGES, whatever the order in which they are asked for; the teacher is measured at the end."""
    seen = Seen(monkeypatch)
    figures = run(CONFIG, RUN, MODELS, chosen)
    expected = [call for name in STAGES if name in chosen for call in EXPECTED[name][0]]
    measured = bool({*MEASURES} & {*chosen})
    expected += MEASURED if measured else []
    said = [(name, tuple(... if isinstance(part, Parts) else part for part in given)) for name, given in seen.calls]
    assert said == expected
    rows = [EXPECTED[name][1] for name in STAGES if name in chosen] + [{"teacher 50 steps right": 0.5}] * measured
    assert figures == {name: value for row in rows for name, value in row.items()}


def test_the_command_runs_the_stages_that_it_is_asked_for_and_claims_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pretraining, "run", lambda *given: (asked.append(given), {"a figure": 0.5})[1])
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    app = {"preset": "shapes", "out": tmp_path / "run", "models": tmp_path / "m", "setting": ["teacher.steps=9"]}
    pretrain.main(**app, stage=None, threads=0, dry_run=False)
    pretrain.main(**app, stage=["reader", "teacher"], threads=3, dry_run=False)
    config = changed(ShapesPretraining(), {"teacher.steps": 9})
    assert asked == [(config, tmp_path / "run", tmp_path / "m", s) for s in (STAGES, ("reader", "teacher"))]
    assert threads == [3] and json.loads((tmp_path / "run" / "config.json").read_text())["teacher"]["steps"] == 9
    pretrain.main(**{**app, "out": tmp_path / "no"}, stage=None, threads=0, dry_run=True)
    assert json.loads(capsys.readouterr().out)["teacher"]["steps"] == 9 and not (tmp_path / "no").exists()
    for wrong in ({"stage": ["judge"]}, {"preset": "flux"}, {"setting": ["teacher.step=9"]}, {"setting": ["seed=1"]}):
        with pytest.raises(typer.Exit) as error:
            pretrain.main(**{**app, "stage": None, "threads": 0, "dry_run": False, **wrong})
        assert error.value.exit_code == 2
    assert len(asked) == 2


def test_a_scorers_card_has_its_accuracies_and_its_training(tmp_path: Path) -> None:
    tokenizer = vocabulary.tokenizer()
    for name, kind in (("trained", "query"), ("heldout", "clip"), ("reader", "reader")):
        training: Any = getattr(CONFIG, name)
        model = rewards.build(rewards.ScorerConfig(kind, len(tokenizer), vocabulary.MAX_TOKENS, 1, 0, width=16))
        pretraining.write_scorer(model, training, {"image:size": 0.875, "all": 0.5}, tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert card.startswith(f"---\nlicense: apache-2.0\n---\n# Starter scorer: {training.name}\n\n")
        learned = "scenes whose words the world knows, and on generators' pictures"
        assert f"({kind}), trained on\n{learned if kind == 'reader' else 'pairs that the world generates'}" in card
        assert "| kind | accuracy |\n|---|---|\n| all | 0.500 |\n| image:size | 0.875 |\n" in card
        assert card.endswith(f"Training: `{json.dumps(asdict(training))}`\n")
        assert rewards.load(tmp_path / name).config.kind == kind


def test_a_teacher_is_measured_where_there_is_a_scorer_and_its_card_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretraining._measure_teacher(CONFIG, tmp_path) == {}
    asked: list[Any] = []
    rows = [evaluation(nfe, right) for nfe, right in ((50, 0.9), (16, 0.8), (8, 0.7), (4, 0.2), (50, 0.4))]
    monkeypatch.setattr(teacher_card, "measure", lambda *given: (asked.append(given), rows)[1])
    monkeypatch.setattr(teacher_card, "write", lambda *given: asked.append(given))
    (tmp_path / "shapes-scorers" / "heldout").mkdir(parents=True)
    assert pretraining._measure_teacher(CONFIG, tmp_path) == {} and not asked
    (tmp_path / "shapes-teacher").mkdir()
    found = pretraining._measure_teacher(CONFIG, tmp_path)
    assert found == {
        f"teacher {nfe} steps right": pytest.approx(r) for nfe, r in ((50, 0.9), (16, 0.8), (8, 0.7), (4, 0.2))
    }
    place = tmp_path / "shapes-teacher"
    settings = json.dumps(asdict(CONFIG.teacher))
    assert asked == [(place, tmp_path / "shapes-scorers", 1.5, 7, 64), (place, rows, 1.5, settings)]


def evaluation(nfe: int, right: float, but_shape: float = 0.5, guidance: float = 1.5) -> Evaluation:
    """Ten prompts."""
    shares = {**dict.fromkeys(teacher_card.JUDGED, 0.6), "right": right, "right_but_shape": but_shape}
    judge = {name: [float(k < 10 * share) for k in range(10)] for name, share in shares.items()}
    return Evaluation("teacher", nfe, guidance, {}, judge, [1.0, 3.0])


@pytest.mark.parametrize(
    ("right", "but_shape", "verdict"),
    [(0.8, 0.9, "It is met"), (0.7, 0.9, "It is not met yet"), (0.8, 0.8, "It is not met yet"), (1, 1, "It is met")],
)
def test_the_teachers_card_says_its_figures_and_whether_its_target_is_met(
    right: float, but_shape: float, verdict: str, tmp_path: Path
) -> None:
    rows = [evaluation(50, right, but_shape), evaluation(4, 0.3), evaluation(50, 0.1, guidance=1.0)]
    teacher_card.write(tmp_path, rows, 1.5, "{settings}")
    card = (tmp_path / "README.md").read_text()
    head = "| NFE | guidance | right | right but shape | objects | color | shape | size | relation | diversity |"
    assert f"{head}\n{'|---' * 10}|\n| 50 | 1.5 | {right:.3f} ± " in card
    assert (
        "| 4 | 1.5 | 0.300 ± 0.153 | 0.500 ± 0.167 | 0.600 ± 0.163 |" in card and "| 50 | 1 | 0.100 ± 0.100 |" in card
    )
    assert card.count("| 2.00 ± 1.00 |\n") == 3
    assert f"50 steps. {verdict} (guidance 1.5: {right:.3f} and {but_shape:.3f})." in " ".join(card.split())
    assert "Measured on 10 held-out test prompts" in card and "Training: `{settings}`" in card
    assert "    true_cfg_scale=1.5,\n    num_inference_steps=50,\n    height=64,\n    width=64,\n" in card
    assert f"    max_sequence_length={vocabulary.MAX_TOKENS},\n" in card


@pytest.mark.parametrize("guidance", [2.5, 1.0])
def test_the_teacher_is_measured_at_each_step_count_and_without_guidance(
    guidance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.shapes import small
    from training.shapes.prompts import measuring_prompts

    small.write_models(tmp_path)
    keys: list[str] = []
    asked: list[Any] = []

    def cached(folder: Path, key: str, make: Any) -> str:
        keys.append(key)
        asked.append(make.args)
        return f"row {len(keys)}"

    monkeypatch.setattr(teacher_card, "cached", cached)
    rows = teacher_card.measure(tmp_path / "shapes-teacher", tmp_path / "shapes-scorers", guidance, 9, 3)
    wanted = [(50, guidance), (16, guidance), (8, guidance), (4, guidance), *([(50, 1.0)] if guidance != 1 else [])]
    assert [(len(sampler.sigmas), sampler.guidance) for _, sampler, _ in asked] == wanted
    assert rows == [f"row {k + 1}" for k in range(len(wanted))] and len(set(keys)) == len(wanted)  # type: ignore[comparison-overlap]
    test = measuring_prompts()[2]
    for label, _, plan in asked:
        assert label == "teacher" and (plan.prompts, plan.varied) == (test[:9], test[:3]) and plan.batch == 64
