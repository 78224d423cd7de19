"""The benchmark of the feedback loop: its log is the service's, its differences are paired and clustered by prompt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import feedback_loop
from benchmarks.serving.engine import BUNDLE
from student.runtimes.fake import FakeRuntime, fake_student
from training.prompts import from_files
from training.shapes.grammar import COLORS, SHAPES
from training.shapes.prompts import asked_prompts, fresh_prompts, measuring_prompts

MEASURING = {prompt for part in measuring_prompts() for prompt in part}


def drawn(seed: int, prompts: int = 7, seeds: int = 3) -> feedback_loop.Values:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(prompts, seeds)) for name in feedback_loop.MEASURES}


def test_differences_are_paired_and_their_errors_are_over_prompts() -> None:
    """The answer key: the jackknife that leaves out one prompt with all of its pictures."""
    before, after = drawn(1), drawn(2)
    for row in feedback_loop.compared(before, after):
        difference_PS = after[row.measure] - before[row.measure]
        left_out = np.array([np.delete(difference_PS, p, axis=0).mean() for p in range(7)])
        error = (6 / 7 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
        assert row.gain.mean == pytest.approx(difference_PS.mean())
        assert row.gain.error == pytest.approx(error)
        assert row.shipped.mean == pytest.approx(before[row.measure].mean())
        assert row.retrained.mean == pytest.approx(after[row.measure].mean())
        assert row.errors == pytest.approx(difference_PS.mean() / error)


def test_the_same_pictures_once_more_make_nothing_more_certain() -> None:
    before, after = drawn(1), drawn(2)
    twice = [{name: np.repeat(values_PS, 2, axis=1) for name, values_PS in one.items()} for one in (before, after)]
    for one, other in zip(feedback_loop.compared(*twice), feedback_loop.compared(before, after), strict=True):
        assert one.gain.mean == pytest.approx(other.gain.mean) and one.gain.error == pytest.approx(other.gain.error)


def test_a_constant_lead_is_certain_however_much_prompts_differ() -> None:
    before = drawn(1)
    after = {name: values_PS + 0.25 for name, values_PS in before.items()}
    for row in feedback_loop.compared(before, after):
        assert row.gain.mean == pytest.approx(0.25) and row.gain.error == pytest.approx(0, abs=1e-12)
        assert row.shipped.error > 0.1


def test_both_students_draw_a_prompt_with_the_same_seeds_and_none_twice(tmp_path: Path) -> None:
    seeds = feedback_loop.seeds_of(5, 100, 4)
    assert len(set(seeds)) == 400 and seeds[:4] == [5 + s * feedback_loop.PRIME for s in range(4)]
    group = feedback_loop.Group("some", ["a red heart", "a blue star"], 3)
    found = feedback_loop.measured(FakeRuntime(), group, 2, tmp_path)
    again = feedback_loop.measured(FakeRuntime(), group, 2, tmp_path)  # read from its file
    first = feedback_loop.FIRST_SEED
    for p, prompt in enumerate(group.prompts):
        for s in range(3):
            seed = first + p + s * feedback_loop.PRIME
            image = FakeRuntime().draw([prompt], [seed], 2)
            score = FakeRuntime().score(image, [prompt])
            assert found["trained"][p, s] == pytest.approx(float(score["trained"][0]))
            assert found["heldout"][p, s] == again["heldout"][p, s] == pytest.approx(float(score["heldout"][0]))


def test_the_table_has_a_line_for_each_group_and_step_count() -> None:
    group = feedback_loop.Group("some", ["a red heart"] * 7, 3)
    rows = feedback_loop.compared(drawn(1), drawn(2))
    lines = feedback_loop.report([(group, 4, rows), (group, 1, rows)]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| some (7 x 3) | 4 | ")
    assert f"{rows[0].gain.mean:+.3f} ± {rows[0].gain.error:.3f}" in lines[2]


def test_what_is_asked_may_train_and_what_is_fresh_may_not() -> None:
    asked, fresh = asked_prompts(500, 3, 1), fresh_prompts(300, 4)
    assert len(asked) == 500 and not MEASURING & set(asked)
    assert len(set(fresh)) == 300 and not set(asked) & set(fresh)
    calibration, validation, _ = measuring_prompts()
    assert not {*calibration, *validation} & set(fresh)


def test_the_traffic_goes_over_http_and_training_reads_what_ranked_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_RUNTIME", "fake")
    for name in ("FEWSTEP_FEEDBACK_MAX", "FEWSTEP_FEEDBACK_PERCENTILE", "FEWSTEP_MODEL"):  # what it sets ends here
        monkeypatch.setenv(name, "20")
    feedback_loop.traffic(60, tmp_path, BUNDLE)
    assert os.environ["FEWSTEP_MODEL"] == str(BUNDLE)
    asked = asked_prompts(60, *feedback_loop.TRAFFIC_KEY)
    steps, low = fake_student().steps[0], dict[str, bool]()
    for seed, prompt in enumerate(asked):
        image = FakeRuntime().draw([prompt], [seed], steps)
        score = float(FakeRuntime().score(image, [prompt])["trained"][0])
        percentiles = fake_student().reward_reference["trained"].percentiles
        assert percentiles
        low[prompt] = low.get(prompt, False) or score < percentiles["20"]
    rows = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text("utf-8").splitlines()]
    assert {row["prompt"] for row in rows} == {prompt for prompt, is_low in low.items() if is_low} != set()
    prompts = from_files(tmp_path / "mixed.jsonl", tmp_path / "measuring.txt", 1)
    passed = [prompt for step in range(200) for prompt in prompts.train(step, 8)]
    ordinary = max(passed.count(prompt) for prompt, is_low in low.items() if not is_low)
    assert set(passed) == set(asked) and all(passed.count(row["prompt"]) > 4 * ordinary for row in rows)
    even = from_files(tmp_path / "even.jsonl", tmp_path / "measuring.txt", 1)
    assert sorted(even.train(0, len(set(asked)))) == sorted(set(asked))


def test_the_narrow_student_is_trained_on_every_shape_but_two(tmp_path: Path) -> None:
    feedback_loop.narrow(tmp_path)
    narrow = (tmp_path / "narrow.txt").read_text("utf-8").splitlines()
    assert len(set(narrow)) == feedback_loop.NARROW and not MEASURING & set(narrow)
    words = {word for prompt in narrow for word in prompt.split()}
    assert {shape for shape in SHAPES if shape in words} == {*SHAPES} - {"star", "heart"}
    assert set((tmp_path / "measuring.txt").read_text("utf-8").splitlines()) == MEASURING
    assert feedback_loop.unseen("a red star left of a blue ring") and not feedback_loop.unseen("a red ring")


def test_the_picture_shows_both_students_with_the_same_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = dict[str, torch.Tensor]()
    monkeypatch.setattr(feedback_loop, "load", lambda bundle, *_: Tinted(0.25 if bundle.name == "after" else 0.0))
    monkeypatch.setattr("training.figures.grid", lambda rows, path: shown.update(rows))
    feedback_loop.picture(tmp_path / "before", tmp_path / "after", tmp_path / "picture.png")
    assert [name.split(":")[0] for name in shown] == ["served", "retrained"] * 2
    for shape, at in (("star", 0), ("heart", 2)):
        before, after = list(shown.values())[at : at + 2]
        plain = [FakeRuntime().draw([f"a {color} {shape}"], [i], 4)[0] for i, color in enumerate(COLORS)]
        assert np.array_equal(before.numpy(), np.stack(plain)) and np.array_equal(after.numpy(), np.stack(plain) + 0.25)


class Tinted(FakeRuntime):
    def __init__(self, tint: float) -> None:
        super().__init__()
        self.tint = tint

    def draw(self, *arguments: Any, **others: Any) -> Any:
        return super().draw(*arguments, **others) + self.tint
