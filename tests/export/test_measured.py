"""The measurement of a student's own pictures: which are drawn, what becomes of the scores, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from export import measure
from export.errors import ExportError
from export.measure import Measurement
from student.bundle import Scorer
from tests import tiny

OWN, OTHER = (64, 64), (32, 96)
ROW = Scorer("scorers/bright.onnx", 0.0, 1.0, "heldout", "s", "bright")


class Drawing:
    """Four pictures at a time; notes what it is asked. A picture's score is its number plus a tenth of its steps."""

    max_batch = 4

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.student = tiny.student({})
        if sizes:
            self.sizes = sizes
        self.asked: list[tuple[list[str], list[int], int, Any]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Any = None) -> Any:
        self.asked.append((list(prompts), list(seeds), steps, size))
        return np.array([seed + steps / 10 for seed in seeds])


SCORERS: Any = SimpleNamespace(
    names=("bright",), score=lambda images, prompts: {"bright": np.where(images == 3.4, math.nan, images)}
)


def measured(bundle: Path, runtime: Drawing, images: int, prompts: Sequence[str] = ("a", "b", "c")) -> Any:
    asked = Measurement(("bright",), tuple(prompts), images)
    (bundle / "scorers").mkdir(exist_ok=True)
    return measure._measure(bundle, cast(Any, runtime), SCORERS, asked, {"bright": "s"})


def test_every_step_count_and_size_has_as_many_pictures_of_the_prompts_in_turn(tmp_path: Path) -> None:
    runtime = Drawing(OWN, OTHER)
    found = measured(tmp_path, runtime, 6)["bright"]
    texts = (["a", "b", "c", "a"], ["b", "c"])
    assert runtime.asked == [
        (texts[part], seeds, steps, size)
        for size in (None, OTHER)
        for steps in (4, 2)
        for part, seeds in enumerate(([0, 1, 2, 3], [4, 5]))
    ]
    assert list(found) == [(4, OWN), (2, OWN), (4, OTHER), (2, OTHER)]
    assert found[4, OWN] == pytest.approx([0.4, 1.4, 2.4, None, 4.4, 5.4]), "a score that is no number is none"
    assert found[2, OTHER] == pytest.approx([0.2, 1.2, 2.2, 3.2, 4.2, 5.2])


def test_a_measurement_goes_on_where_it_stopped_unless_its_prompts_are_others(tmp_path: Path) -> None:
    first = measured(tmp_path, Drawing(), 6)
    again = Drawing()
    assert measured(tmp_path, again, 6) == first and again.asked == []
    more = Drawing()
    assert len(measured(tmp_path, more, 9)["bright"][4, OWN]) == 9
    assert [seeds for _, seeds, steps, _ in more.asked if steps == 4] == [[6, 7, 8]]
    other = Drawing()
    measured(tmp_path, other, 6, prompts=("a", "b"))
    assert len(other.asked) == 4


def test_0_and_1_are_the_own_sizes_most_steps_and_the_rest_is_relative_to_them() -> None:
    student, values = tiny.student({}), [float(k) for k in range(10)]
    mean, std = 4.5, math.sqrt(sum((k - 4.5) ** 2 for k in range(10)) / 9)
    scores: Any = {(2, OWN): [v + 2 for v in values], (4, OTHER): [v - 1 for v in values], (4, OWN): [*values, None]}
    found = measure._with_scorer(student, "bright", ROW, scores, 3)
    assert found.scorers["bright"] == replace(ROW, mean=pytest.approx(mean), std=pytest.approx(std))
    reference = found.reward_reference["bright"]
    assert (reference.mean, reference.std, reference.count) == (pytest.approx(0), pytest.approx(1), 3)
    assert reference.at is not None and list(reference.at) == ["4", "2", "4 96x32"]
    assert [one.mean for one in reference.at.values()] == pytest.approx([0, 2 / std, -1 / std], abs=1e-12)
    assert [one.percentiles["100"] for one in reference.at.values()] == pytest.approx(
        [4.5 / std, 6.5 / std, 3.5 / std]
    )  # fmt: skip


def test_a_scorer_that_says_too_little_is_refused() -> None:
    student, enough = tiny.student({}), [float(k) for k in range(8)]
    measure._with_scorer(student, "bright", ROW, {(4, OWN): enough}, 8)
    with pytest.raises(ExportError, match="^the reward 'bright' scored 7 pictures of 2 steps: 8 or more are needed$"):
        measure._with_scorer(student, "bright", ROW, {(4, OWN): enough, (2, OWN): [None, *enough[1:]]}, 8)
    for same in ([3.0] * 8, [1e6] * 7 + [1e6 + 1e-7]):
        with pytest.raises(ExportError, match="^the reward 'bright' gave the same score for every picture"):
            measure._with_scorer(student, "bright", ROW, {(4, OWN): same}, 8)
    tight = [1e6] * 7 + [1e6 + 1e-5]
    assert 0 < measure._with_scorer(student, "bright", ROW, {(4, OWN): tight}, 8).scorers["bright"].std < 1e-5
    assert measure.check_images(8) == 8
    with pytest.raises(ExportError, match="^images is 7: accepted is 8 or more$"):
        measure.check_images(7)


@pytest.mark.parametrize(
    ("reward", "gb"),
    [
        ("pickscore", 4), ("hpsv2.1", 4), ("imagereward", 2), ("clip", 2), ("aesthetic", 2), ("geneval", 2),
        ("hpsv3", 31), ("own.module:Class", 0),
    ],
)  # fmt: skip
def test_a_rewards_memory_is_asked_for_beside_the_students(
    reward: str, gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (gb + 2 + 3) * 10**9
    monkeypatch.setattr(measure, "free_bytes", lambda: needed)
    measure._require_memory((reward, "clip"), 3 * 10**9, "measuring")
    monkeypatch.setattr(measure, "free_bytes", lambda: needed - 1)
    said = f"^measuring {reward}, clip on it needs about {gb + 5}.00 GB of memory, and {gb + 5}.00 GB are free$"
    with pytest.raises(ExportError, match=said):
        measure._require_memory((reward, "clip"), 3 * 10**9, "measuring", " on it")
    monkeypatch.setattr(measure, "free_bytes", lambda: None)
    measure._require_memory((reward,), 10**15, "measuring")


def test_drawing_takes_the_largest_runtime_else_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "numbers_of", lambda bundle: {"a": 70, "b": 100})
    for gpu, expected in (((None, "none"), 4 * 170), ((object(), ""), 2 * 100)):
        monkeypatch.setattr(measure, "find_gpu", lambda gpu=gpu: gpu)
        assert measure.drawing_bytes(tmp_path) == expected
    for folder, sizes in (("one", (3, 4)), ("two", (5, 1)), (".work", (99, 99))):
        (tmp_path / "runtimes" / folder / "in").mkdir(parents=True)
        (tmp_path / "runtimes" / folder / "a").write_bytes(bytes(sizes[0]))
        (tmp_path / "runtimes" / folder / "in" / "b").write_bytes(bytes(sizes[1]))
    (tmp_path / "runtimes" / "batches.json").write_bytes(bytes(50))
    assert measure.drawing_bytes(tmp_path) == 7


@pytest.mark.parametrize(
    ("reward", "name"),
    [("hpsv2.1", "hpsv2.1"), ("own.module:Class", "own.module-Class"), ("-a b_c.", "a-b_c"), ("x" * 99, "x" * 64)],
)
def test_a_scorers_name_is_the_rewards_without_odd_characters(reward: str, name: str) -> None:
    assert measure._name(reward) == name
    with pytest.raises(ExportError, match="^the reward '::' has a name from which no scorer's name can be made$"):
        measure._name("::")


def test_the_first_prompts_are_kept_for_the_proof_unless_training_left_some(tmp_path: Path) -> None:
    prompts = [f"prompt {k}" for k in range(40)]
    measure._keep_prompts(tmp_path, prompts)
    assert (tmp_path / "calibration.txt").read_text() == "\n".join(prompts[:32]) + "\n"
    measure._keep_prompts(tmp_path, ["others"])
    assert (tmp_path / "calibration.txt").read_text().startswith("prompt 0\n")


def test_a_file_of_prompts_is_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with pytest.raises(ExportError, match="cannot be read as a file of prompts: "):
        measure.read_prompt_file(file)
    file.write_text("  a heart \n\n a ring\n")
    assert measure.read_prompt_file(file) == ("a heart", "a ring")
    file.write_text("a heart\n \n")
    with pytest.raises(ExportError, match="has 1 prompts: accepted are two or more, one per line$"):
        measure.read_prompt_file(file)
    file.write_bytes(b"\xff\xfe\xff\n")
    with pytest.raises(ExportError, match="cannot be read as a file of prompts: "):
        measure.read_prompt_file(file)


def test_a_compiled_scorer_is_kept_for_the_weights_that_it_was_made_of(tmp_path: Path) -> None:
    file = tmp_path / "bright.onnx"
    assert not measure._is_there(file, "s")
    file.write_bytes(b"x")
    assert not measure._is_there(file, "s")
    file.with_suffix(".json").write_text('{"source_sha256": "s"}')
    assert measure._is_there(file, "s") and not measure._is_there(file, "t")
    file.unlink()
    assert not measure._is_there(file, "s")


def test_scorers_whose_journals_end_at_different_pictures_all_have_every_picture(tmp_path: Path) -> None:
    measured(tmp_path, Drawing(), 8)  # the first scorer alone
    asked, both = (
        Measurement(("bright", "dark"), ("a", "b", "c"), 12),
        SimpleNamespace(names=("bright", "dark"), score=lambda images, prompts: {"bright": images, "dark": -images}),
    )
    runtime = Drawing()
    found = measure._measure(tmp_path, cast(Any, runtime), cast(Any, both), asked, {"bright": "s", "dark": "t"})
    for steps in (4, 2):
        expected = [number + steps / 10 for number in range(12)]
        assert found["dark"][steps, OWN] == pytest.approx([-value for value in expected])
        assert found["bright"][steps, OWN] == pytest.approx(expected)
