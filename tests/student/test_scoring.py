"""What becomes of scorers' raw numbers: standardised, of served pictures, of videos, and of scorers that fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from student.bundle import Scorer, Student
from student.runtimes import scoring
from student.runtimes.scoring import AT_ONCE, Scorers, served, standardised
from tests import tiny

Score = Callable[[np.ndarray, Sequence[str]], Any]


def student(**rewards: str | None) -> Student:
    rows = {
        name: Scorer(f"scorers/{name}.onnx", 10.0 * k, 2.0 + k, "heldout", reward=reward)
        for k, (name, reward) in enumerate(rewards.items(), 1)
    }
    return replace(tiny.student({}), scorers=rows)


def opened(tmp_path: Path, score: Score) -> Scorers:
    return Scorers(tmp_path, student(bright="b"), 1, lambda name: score)


def test_pictures_are_scored_as_bytes_and_each_with_its_own_prompt(tmp_path: Path) -> None:
    asked: list[tuple[np.ndarray, list[str]]] = []

    def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        asked.append((images, list(prompts)))
        return np.array([float(prompt) for prompt in prompts])

    images = np.linspace(-0.2, 1.2, 40 * 3 * 4 * 4, dtype=np.float32).reshape(40, 3, 4, 4)
    prompts = [str(k) for k in range(40)]
    found = opened(tmp_path, score).score(images, prompts)
    np.testing.assert_allclose(found["bright"], (np.arange(40) - 10) / 3, rtol=1e-6)
    assert found.keys() == {"bright"} and found["bright"].dtype == np.float32
    assert [part for _, part in asked] == [prompts[:AT_ONCE], prompts[AT_ONCE : 2 * AT_ONCE], prompts[2 * AT_ONCE :]]
    given = np.concatenate([part for part, _ in asked])
    assert given.dtype == np.float32 and 0 == given.min() and given.max() == 1
    np.testing.assert_array_equal(given, (np.round(images.clip(0, 1) * 255) / np.float32(255)).astype(np.float32))
    np.testing.assert_array_equal(served(given), given)


def test_a_videos_score_is_the_mean_of_its_frames(tmp_path: Path) -> None:
    asked: list[str] = []

    def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        asked.extend(prompts)
        return images[:, 0, 0, 0] * 255

    videos = np.zeros((2, 5, 3, 2, 2), np.float32)
    videos[:, :, 0] = (np.arange(10, dtype=np.float32).reshape(2, 5) / 255)[..., None, None]
    found = opened(tmp_path, score).score(videos, ["a", "b"])
    np.testing.assert_allclose(found["bright"], (np.array([2.0, 7.0]) - 10) / 3, rtol=1e-5)
    assert asked == ["a"] * 5 + ["b"] * 5 and found["bright"].dtype == np.float32
    assert opened(tmp_path, score).score(videos[:, :1], ["a", "b"])["bright"].shape == (2,)


def test_no_picture_has_no_score(tmp_path: Path) -> None:
    found = opened(tmp_path, lambda images, prompts: 1 / 0).score(np.zeros((0, 3, 2, 2), np.float32), [])
    assert found["bright"].shape == (0,) and found["bright"].dtype == np.float32


@pytest.mark.parametrize(
    "wrong", [lambda n: np.zeros((n, 1)), lambda n: np.zeros(n + 1), lambda n: ["x"] * n, lambda n: None]
)
def test_an_answer_of_another_form_is_a_failure_of_every_picture(
    tmp_path: Path, wrong: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def score(images: np.ndarray, prompts: Sequence[str]) -> Any:
        calls.append(len(images))
        return wrong(len(images))

    found = opened(tmp_path, score).score(np.zeros((3, 3, 2, 2), np.float32), ["a", "b", "c"])
    assert np.isnan(found["bright"]).all() and found["bright"].shape == (3,) and calls == [3, 1, 1, 1]
    assert len(caplog.records) == 3 and "the scorer bright failed on a picture" in caplog.text


def test_a_failure_costs_its_own_picture_and_no_other_scorers(tmp_path: Path) -> None:
    def open_(name: str) -> Score:
        def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            if name == "b" and "bad" in prompts:
                raise RuntimeError("no")
            return np.array([len(prompt) for prompt in prompts])

        return score

    prompts = ["x", "bad", "yyy", "zzzz"]
    found = Scorers(tmp_path, student(bright="b", dark="d"), 1, open_).score(
        np.zeros((4, 3, 2, 2), np.float32), prompts
    )
    np.testing.assert_allclose(found["bright"], [-3, np.nan, -7 / 3, -2], rtol=1e-6)
    np.testing.assert_allclose(found["dark"], (np.array([1.0, 3, 3, 4]) - 20) / 4, rtol=1e-6)


def test_a_reward_is_opened_once_and_what_cannot_be_opened_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str] = []

    def open_(name: str) -> Score:
        tried.append(name)
        if name == "broken":
            raise ImportError("no such package")
        return lambda images, prompts: np.zeros(len(images))

    scorers = Scorers(tmp_path, student(one="good", two="broken", three=None), 1)
    assert scorers.names == () and scorers.score(np.zeros((1, 3, 2, 2), np.float32), ["a"]) == {}
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            scorers.open_named(open_)
    assert scorers.names == ("one",) and tried == ["good", "broken"]
    assert caplog.messages == ["the scorer two (broken) is left out: no such package"]


def test_a_compiled_scorer_is_not_opened_by_its_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "one.onnx").touch()
    monkeypatch.setattr(scoring, "check_scorer", lambda *given: checked.append(given))
    monkeypatch.setattr(
        scoring, "CompiledScorer", lambda path, threads: lambda images, prompts: np.full(len(images), threads)
    )
    both = student(one="good", two="good")
    found = Scorers(tmp_path, both, 3, lambda name: lambda images, prompts: np.zeros(len(images)))
    assert found.names == ("one", "two") and checked == [(tmp_path, both, "one")]
    scores = found.score(np.zeros((1, 3, 2, 2), np.float32), ["a"])
    assert (scores["one"][0], scores["two"][0]) == (pytest.approx(-7 / 3), pytest.approx(-5.0))


def test_a_large_mean_costs_a_small_spread_no_digits() -> None:
    raw_B = np.float32([1000.0, 1000.0625])
    found = standardised(raw_B, Scorer("x", 1000.00001, 0.00001, "heldout"))  # float32's next number is 1000.00006
    np.testing.assert_allclose(found, [-1.0, 6249.0], rtol=1e-5)
    assert found.dtype == np.float32
