"""What adding a reward leaves in a bundle, with a runtime and rewards that cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import measure, within
from export.errors import ExportError, NoOnnxForm
from export.measure import Measurement, add_scorers
from export.reference import measure_reference
from student.bundle import RewardReference, Scorer, read_student, rewrite_student
from student.runtimes.fake import FakeRuntime, fake_student
from tests import tiny

OLD = Scorer("scorers/old.onnx", 0.5, 2.0, "trained", "abc")
PROMPTS = tuple(f"prompt {k}" for k in range(40))


class Compilable:
    """A reward that has a graph."""


class Drawing:
    """Draws a picture's seed; notes how often."""

    max_batch = 16

    def __init__(self) -> None:
        self.student, self.drawn = tiny.student({}), 0

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        self.drawn += len(seeds)
        return np.array(seeds, float) + steps


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle with a scorer of its own, and what is asked of the rewards."""
    about = SimpleNamespace(
        bundle=tmp_path, runtime=Drawing(), source="s1", left_out=set(), exported=[], said=[], loaded=[], fails=None
    )
    student = replace(tiny.student({"old": OLD}), reward_reference={"old": RewardReference(0.1, 0.9, {})})
    rewrite_student(tmp_path, student)
    (tmp_path / "scorers").mkdir()

    class Found:
        def __init__(self, bundle: Path, student: Any, threads: int, open_reward: Any) -> None:
            assert (bundle, threads) == (tmp_path, 3)
            self.names = tuple(name for name in student.scorers if name not in about.left_out)

        def score(self, images: Any, prompts: Sequence[str]) -> dict[str, Any]:
            assert len(images) == len(prompts)
            return {name: images * k for k, name in enumerate(self.names, 1)}

    def load(bundle: Path, runtime: str, threads: int) -> Any:
        about.loaded.append((bundle, runtime, threads))
        return about.runtime

    def export_scorer(file: Path, reward: Any, source: str, sizes: Any) -> float:
        if about.fails is not None:
            raise about.fails
        about.exported.append((file, source, sizes))
        file.write_text("graph")
        file.with_suffix(".json").write_text(f'{{"source_sha256": "{source}"}}')
        return 1e-5

    for name, value in {
        "Scorers": Found, "load": load, "export_scorer": export_scorer, "TwoStage": Compilable,
        "find": lambda name: Compilable() if name == "graph" else object(), "check_memory": lambda *given: None,
        "fingerprint": lambda name, reward: f"{name} {about.source}",
    }.items():  # fmt: skip
        monkeypatch.setattr(measure, name, value)
    return about


def asked(*rewards: str, images: int = 24, about: Any = None) -> Measurement:
    return Measurement(rewards, PROMPTS, images, "onnx", 3, about.said.append if about else print)


def test_a_reward_comes_beside_those_that_are_there(made: Any) -> None:
    before = read_student(made.bundle)
    student = add_scorers(made.bundle, asked("graph", "own.module:Class", about=made))
    assert student == read_student(made.bundle) and student.scorers["old"] == OLD
    assert student.reward_reference["old"] == before.reward_reference["old"]
    for k, (name, reward) in enumerate((("graph", "graph"), ("own.module-Class", "own.module:Class")), 1):
        row = student.scorers[name]
        assert (row.file, row.role, row.source_sha256, row.reward) == (
            f"scorers/{name}.onnx", "heldout", f"{reward} s1", reward,
        )  # fmt: skip
        values = k * (np.arange(24) + max(student.steps))
        assert (row.mean, row.std) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
        assert set(student.reward_reference[name].at or {}) == {"4", "2"}
    assert student.fingerprint() == before.fingerprint() and made.loaded == [(made.bundle, "onnx", 3)]
    assert made.exported == [(made.bundle / "scorers" / "graph.onnx", "graph s1", ((64, 64),))]
    assert made.said == ["graph: compiled, at most 1.0e-05 standard deviations from torch"]
    assert (made.bundle / "calibration.txt").read_text("utf-8").splitlines() == list(PROMPTS[:32])
    assert sorted(path.name for path in (made.bundle / "scorers").iterdir()) == ["graph.json", "graph.onnx"]


def test_prompts_that_training_left_stay(made: Any) -> None:
    (made.bundle / "calibration.txt").write_text("mine\nyours\n")
    add_scorers(made.bundle, asked("x"))
    assert (made.bundle / "calibration.txt").read_text() == "mine\nyours\n"


@pytest.mark.parametrize("what", ["stopped", "left out"])
def test_a_reward_that_cannot_run_or_was_interrupted_changes_nothing_in_the_manifest(made: Any, what: str) -> None:
    before = (made.bundle / "student.json").read_bytes()
    if what == "left out":
        made.left_out = {"y"}
        with pytest.raises(ExportError, match="^the reward 'y' cannot run here; nothing was added$"):
            add_scorers(made.bundle, asked("x", "y"))
        assert made.loaded == []
    else:
        draw = made.runtime.draw

        def once(*call: Any) -> Any:
            if made.runtime.drawn >= 16:
                raise KeyboardInterrupt
            return draw(*call)

        made.runtime.draw = once
        with pytest.raises(KeyboardInterrupt):
            add_scorers(made.bundle, asked("x"))
        made.runtime.draw = draw
        add_scorers(made.bundle, asked("x"))
        assert made.runtime.drawn == 2 * 24, "each picture is drawn once, before the interruption or after it"
        return
    assert (made.bundle / "student.json").read_bytes() == before


def test_scores_of_other_weights_are_not_taken_up_again(made: Any) -> None:
    made.left_out = set()
    draw, about = made.runtime.draw, made.runtime

    def stop(*call: Any) -> Any:
        if about.drawn >= 16:
            raise KeyboardInterrupt
        return draw(*call)

    about.draw = stop
    with pytest.raises(KeyboardInterrupt):
        add_scorers(made.bundle, asked("x"))
    about.draw, about.drawn, made.source = draw, 0, "s2"
    add_scorers(made.bundle, asked("x"))
    assert about.drawn == 2 * 24


def test_a_graph_is_compiled_again_only_for_other_weights(made: Any) -> None:
    for source, count in (("s1", 1), ("s1", 1), ("s2", 2)):
        made.source = source
        add_scorers(made.bundle, asked("graph"))
        assert len(made.exported) == count
    (made.bundle / "scorers" / "graph.onnx").unlink()
    add_scorers(made.bundle, asked("graph"))
    assert len(made.exported) == 3


def test_a_reward_without_an_onnx_form_runs_in_torch(made: Any) -> None:
    made.fails = NoOnnxForm("an operator has none")
    assert "graph" in add_scorers(made.bundle, asked("graph", about=made)).scorers
    assert made.said == ["graph: runs in torch, because an operator has none"]


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle of the fake student, the fake runtime, and what it draws."""
    rewrite_student(tmp_path, fake_student())
    runtime = FakeRuntime()
    runtime.student = read_student(tmp_path)
    about = SimpleNamespace(bundle=tmp_path, runtime=runtime, drawn=[], most=10**9)
    draw = runtime.draw

    def noted(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        if len(about.drawn) >= about.most:
            raise KeyboardInterrupt
        about.drawn.append((prompts[0], list(seeds), steps))
        return draw(prompts, seeds, steps)

    monkeypatch.setattr(runtime, "draw", noted)
    monkeypatch.setattr(within, "load", lambda bundle, name, threads, options: runtime)
    return about


def test_pictures_of_a_prompt_have_seeds_one_after_another(faked: Any) -> None:
    student = within.add_within_prompt(faked.bundle, ("a", "b"), 19, "auto", 1)
    first = within.FIRST_SEED
    parts = [list(range(first, first + 8)), list(range(first + 8, first + 16)), list(range(first + 16, first + 19))]
    assert faked.drawn == [(prompt, part, steps) for steps in (1, 2, 4) for prompt in "ab" for part in parts]
    assert read_student(faked.bundle) == student and not (faked.bundle / within.KEPT).exists()
    for prompts, seeds in ((("a", "b"), 1), (("a",), 2)):
        with pytest.raises(ExportError, match=f"^{len(prompts)} prompts and {seeds} seeds: accepted are two or more"):
            within.add_within_prompt(faked.bundle, prompts, seeds, "auto", 1)


@pytest.mark.parametrize("change", ["nothing", "seeds", "scorers", "student"])
def test_what_was_measured_is_taken_up_again_only_by_the_same_measurement(faked: Any, change: str) -> None:
    faked.most = 4
    with pytest.raises(KeyboardInterrupt):
        within.add_within_prompt(faked.bundle, ("a", "b"), 3, "auto", 1)
    student = faked.runtime.student
    if change == "scorers":
        faked.runtime.student = replace(student, scorers={**student.scorers, "more": student.scorers["trained"]})
    if change == "student":
        faked.runtime.student = replace(student, max_tokens=99)
    faked.most = 10**9
    faked.drawn.clear()
    within.add_within_prompt(faked.bundle, ("a", "b"), 4 if change == "seeds" else 3, "auto", 1)
    assert len(faked.drawn) == (2 if change == "nothing" else 6)


def test_a_reference_that_is_measured_leaves_other_scorers_alone_and_failures_out(faked: Any) -> None:
    other = RewardReference(0.3, 0.4, {"50": 0.3})
    rewrite_student(faked.bundle, replace(read_student(faked.bundle), reward_reference={"other": other}))
    score = faked.runtime.score

    def failing(images: Any, prompts: Sequence[str]) -> Any:
        found = score(images, prompts)
        found["trained"][[prompt == "prompt 3" for prompt in prompts]] = np.nan
        return found

    faked.runtime.score = failing
    student = measure_reference(faked.bundle, faked.runtime, PROMPTS[:30])
    assert student == read_student(faked.bundle) and student.reward_reference["other"] == other
    counts = {name: student.reward_reference[name].count for name in ("trained", "heldout")}
    assert counts == {"trained": 29, "heldout": 30}
    assert np.isfinite(student.reward_reference["trained"].mean)
    assert {steps for _, _, steps in faked.drawn} == {1, 2, 4}
