"""The evaluation of the starter models (docs/starter.md): what its rows are made of, and each figure by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer

from rewards import shapes as rewards
from training.config import ConfigError
from training.shapes import acceptance, degrade, pairs, vocabulary, world
from training.shapes.acceptance import Row, headroom, mean_error, measured, quality, scenes_of, styles_of, within_prompt
from training.shapes.grammar import parse
from training.shapes.judging import judge_prompts

TEXTS = [
    "a large red star on a navy background",
    "a blue ring",
    "a small green heart above a large black cross",
    "a red cross",
]


def test_a_scene_has_what_its_caption_says_and_samples_what_it_leaves_out() -> None:
    scenes = scenes_of(TEXTS * 15, 3)
    for i, text in enumerate(TEXTS * 15):
        asked, shown = parse(text), scenes.caption(i)
        assert [(t.color, t.shape) for t in asked.things] == [(t.color, t.shape) for t in shown.things]
        assert all(t.size in (None, other.size) for t, other in zip(asked.things, shown.things, strict=True))
        assert asked.relation == shown.relation and asked.background in (None, shown.background)
    rings = scenes.take(np.arange(1, 60, 4))
    assert set(rings.size_NK[:, 0]) == {0, 1} and set(rings.background_N) == {0, 1, 2, 3}
    assert all(judge_prompts(world.render_NCHW(scenes), TEXTS * 15)["right"])
    again, other = scenes_of(TEXTS, 3, 1), scenes_of(TEXTS, 3, 2)
    assert (again.x_NK == scenes_of(TEXTS, 3, 1).x_NK).all() and not (again.x_NK == other.x_NK).any()


def test_a_style_is_what_a_caption_names() -> None:
    styles = styles_of(TEXTS)
    assert styles.size_N.tolist() == [True, False, True, False]
    assert styles.background_N.tolist() == [True, False, False, False]
    assert styles.article_N.all() and not styles.filler_N.any()
    assert pairs.captions(scenes_of(TEXTS, 1), styles)[0] == TEXTS[0]


def test_pictures_are_judged_and_scored_for_their_own_captions() -> None:
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(2)
    scorer = rewards.build(rewards.ScorerConfig("clip", len(tokenizer), vocabulary.MAX_TOKENS, 1, 0, width=16)).eval()
    texts = TEXTS * 17  # more than one batch
    images = world.render_NCHW(scenes_of(texts, 3))
    images[0] = 0.5
    row = measured("truth", images, texts, {"own": scorer})
    assert row.name == "truth" and row.right.tolist() == [0.0, *[1.0] * 67] and row.right_but_shape[0] == 0
    with torch.no_grad():
        expected = scorer(images, torch.tensor(vocabulary.encode(tokenizer, texts)))
    np.testing.assert_allclose(row.scores["own"], expected.numpy(), atol=1e-5)


def test_a_mean_has_its_standard_error() -> None:
    assert mean_error(np.array([0.0, 1.0, 1.0, 0.0])) == f"0.500 ± {math.sqrt(1 / 3) / 2:.3f}"


def row(name: str, right: list[float], score: list[float], but_shape: list[float] | None = None) -> Row:
    values = np.array(right)
    return Row(name, values, values if but_shape is None else np.array(but_shape), {"t": np.array(score)})


def test_a_scorer_agrees_with_the_judge_within_a_prompt_and_not_across_prompts() -> None:
    """The second prompt scores 50 more whatever is drawn; within prompts the correlation is 3 / sqrt(2 x 5)."""
    rows = [row("a", [1, 0], [3.0, 50.0]), row("b", [0, 1], [1.0, 52.0]), row("c", [1, 0], [2.0, 51.0])]
    right = np.array([[1, 0], [0, 1], [1, 0]]) - [2 / 3, 1 / 3]
    score = np.array([[1, -1], [-1, 1], [0, 0]])
    expected = (right * score).sum() / math.sqrt((right**2).sum() * (score**2).sum())
    assert within_prompt(rows, "t") == pytest.approx(expected) and 0.5 < expected < 1


def test_the_rows_of_known_faults_are_of_the_same_scenes_through_the_autoencoder() -> None:
    halved = SimpleNamespace(encoder=lambda x: x, decoder=lambda z: z / 2)
    scenes = scenes_of(TEXTS * 17, 11)
    found = acceptance.ways(TEXTS * 17, scenes, halved)
    truth = world.render_NCHW(scenes)
    assert list(found) == ["rendered truth", "truth through the autoencoder", "one attribute wrong", "badly drawn"]
    assert torch.equal(found["rendered truth"], truth)
    torch.testing.assert_close(found["truth through the autoencoder"], truth / 2 + 0.25)
    torch.testing.assert_close(found["badly drawn"], degrade.draw(scenes, 71)[0] / 2 + 0.25)
    wrong = judge_prompts(2 * found["one attribute wrong"] - 0.5, TEXTS * 17)
    assert np.mean(wrong["right"]) < 0.03, "each has one part wrong that its caption names"
    assert np.mean(wrong["objects"]) > 0.5


@pytest.mark.filterwarnings("ignore:Degrees of freedom", "ignore:invalid value")
def test_the_table_of_quality_is_by_stratum() -> None:
    """Three of the four prompts are single objects, and one is a pair."""
    truth = row("rendered truth", [1, 1, 1, 1], [0] * 4)
    student = row("student", [1, 0, 0, 0], [0] * 4, [1, 1, 0, 0])
    short = Row("student", np.array([1.0, 0.0]), np.array([1.0, 1.0]), {})
    lines = quality([truth, student], TEXTS, {"student": short}).splitlines()
    assert len(lines) == 4 and lines[1] == "|---" * 8 + "|"
    assert lines[2] == "| rendered truth | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | " + (
        "1.000 ± nan | 1.000 ± nan |  |"
    )
    single = f"0.333 ± {math.sqrt(1 / 3) / math.sqrt(3):.3f}"
    but_shape = f"0.667 ± {math.sqrt(1 / 3) / math.sqrt(3):.3f}"
    assert lines[3].startswith("| student | 0.250 ± 0.250 | 0.500 ± 0.289 | " + f"{single} | {but_shape} | 0.000 ± nan")
    assert lines[3].endswith("| 0.500 ± 0.500 |")


def test_headroom_is_how_far_the_truth_is_above_the_teacher_prompt_by_prompt() -> None:
    rows = [
        row("rendered truth", [1, 1, 1], [9.0, 9.0, 9.0]),
        row("truth through the autoencoder", [1, 1, 1], [0.9, 0.8, 1.0]),
        row("teacher, 50 steps, guidance 2.5", [1, 0, 1], [0.5, 0.2, 0.7]),
        row("student, 4 steps", [0, 0, 1], [0.4, 0.3, 0.6]),
    ]
    lines = headroom(rows, ["t"]).splitlines()
    assert lines[2] == "| rendered truth | 9.000 ± 0.000 |" and lines[5].startswith("| student, 4 steps | 0.433 ± ")
    gap = np.array([0.4, 0.6, 0.3])
    error = gap.std(ddof=1) / math.sqrt(3)
    said = f"{gap.mean():+.3f} ± {error:.3f} ({gap.mean() / error:.1f} errors)"
    assert lines[-2] == f"| **truth (autoencoder) minus teacher** | {said} |"
    assert lines[-1] == f"| **correlation with the judge within prompt** | {within_prompt(rows[1:], 't'):.2f} |"


def test_generators_are_the_teacher_as_on_its_card_and_the_student_at_its_own_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    model = SimpleNamespace(latent_shape=lambda *size: size, sigmas=lambda nfe, shape: (nfe, shape))
    monkeypatch.setattr(
        acceptance, "open_family", lambda *given, **options: (opened.append((given, options)), model)[1]
    )
    bundle = SimpleNamespace(steps=(4, 1), sigmas={4: (1.0, 0.5), 1: (1.0,)})
    monkeypatch.setattr(acceptance, "read_student", lambda path: bundle)
    found = acceptance.drawers(Path("m"))
    assert {name: (one.sigmas, one.guidance) for name, one in found.items()} == {
        "teacher, 50 steps, guidance 2.5": ((50, (64, 64)), 2.5),
        "teacher, 8 steps, guidance 2.5": ((8, (64, 64)), 2.5),
        "student, 1 step": ((1.0,), 1.0),
        "student, 4 steps": ((1.0, 0.5), 1.0),
    }
    assert [given for given, _ in opened] == [(Path("m/shapes-teacher"),), (Path("m/shapes"),)]
    assert all(options["max_tokens"] == vocabulary.MAX_TOKENS for _, options in opened)


def test_picture_i_has_seed_i_over_all_batches() -> None:
    asked: list[Any] = []

    def draw(texts: list[str], seeds: range, shape: Any, batch: int) -> torch.Tensor:
        asked.append((texts, list(seeds), shape, batch))
        return torch.zeros(len(texts), 1)

    sampler: Any = SimpleNamespace(model=SimpleNamespace(latent_shape=lambda *size: size), draw=draw)
    texts = [f"text {k}" for k in range(70)]
    assert len(acceptance._draw(sampler, texts, "label")) == 70
    assert [(given, seeds) for given, seeds, _, _ in asked] == [
        (texts[:64], list(range(64))),
        (texts[64:], list(range(64, 70))),
    ]


def test_an_evaluation_computes_with_as_many_threads_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def prompts() -> Any:
        done.append("begun")
        raise ConfigError("that is enough")

    monkeypatch.setattr(acceptance.prompts, "measuring_prompts", prompts)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    for asked, expected in ((3, [3, "begun"]), (0, ["begun"])):
        done.clear()
        with pytest.raises(typer.Exit):
            acceptance.main(tmp_path, tmp_path / "out.md", asked)
        assert done == expected
