"""The within-prompt measurement, on the shipped student."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from export import within
from export.errors import ExportError
from export.score import score
from student.bundle import Scorer, read_student, rewrite_student
from student.runtimes.load import load
from student.within_prompt import measure
from tests import tiny

STARTER = Path(__file__).resolve().parents[2] / "models" / "shapes"
PROMPTS = ("a red heart", "a large blue star on a cream background")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STARTER, tmp_path / "shapes"))


def test_spread_correlation_and_gain_come_into_the_manifest(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    app = typer.Typer()
    app.command()(score)
    done = CliRunner().invoke(app, [str(bundle), "--prompts", str(file), "--seeds", "3"])
    assert done.exit_code == 0, done.output
    before, student = read_student(STARTER), read_student(bundle)
    assert student.fingerprint() == before.fingerprint() and student.scorers == before.scorers
    assert set(student.within_prompt or {}) == {"1", "2", "4", "8"} and not (bundle / within.KEPT).exists()
    runtime = load(bundle, "auto", 1)
    seeds = [within.FIRST_SEED + k for k in range(3)]
    scores = [runtime.score(runtime.draw([prompt] * 3, seeds, 2), [prompt] * 3) for prompt in PROMPTS]
    expected = measure({name: [row[name].tolist() for row in scores] for name in ("trained", "heldout")})
    assert (student.within_prompt or {})["2"] == expected
    assert "within a prompt at 2 steps" in done.output


def test_an_interrupted_measurement_goes_on_where_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, scores_of = list[tuple[int, str]](), within._scores

    def until_interrupted(runtime: object, steps: int, prompt: str, seeds: int) -> object:
        if len(calls) == 3:
            calls.append((steps, prompt))
            raise KeyboardInterrupt
        calls.append((steps, prompt))
        return scores_of(runtime, steps, prompt, seeds)  # type: ignore[arg-type]

    monkeypatch.setattr(within, "_scores", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        within.add_within_prompt(bundle, PROMPTS, 2, "auto", 1)
    with (bundle / within.KEPT).open("a") as file:
        file.write('[4, "a torn li')
    within.add_within_prompt(bundle, PROMPTS, 2, "auto", 1)
    assert len(calls) == 4 + 5 and calls[3] == calls[4] and len(set(calls)) == 8
    with pytest.raises(ExportError, match="1 prompts and 2 seeds"):
        within.add_within_prompt(bundle, PROMPTS[:1], 2, "auto", 1)


def test_a_scorer_that_fails_often_costs_no_other_its_figures() -> None:
    gen, nan = np.random.default_rng(1), float("nan")
    good = {prompt: gen.normal(size=3).tolist() for prompt in "abcd"}
    often = {prompt: [nan if prompt in "abc" else 0.5, 0.1, 0.2] for prompt in "abcd"}
    once = {prompt: [nan if prompt == "a" else 0.5, 0.1, 0.2] for prompt in "abcd"}
    rows = lambda other: {(2, prompt): {"good": good[prompt], "other": other[prompt]} for prompt in "abcd"}  # noqa: E731
    assert within._measured(rows(often), 2, "abcd") == measure({"good": [good[prompt] for prompt in "abcd"]})
    both = within._measured(rows(once), 2, "abcd")
    assert both == measure({"good": [good[p] for p in "bcd"], "other": [once[p] for p in "bcd"]})


def test_scores_of_an_interrupted_measurement_are_kept_for_the_scorers_and_the_scale_that_they_were_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are standardised: on another scale, or by other weights of the same name, they are made again."""
    asked: list[tuple[int, str]] = []
    limit = [100]

    def scores(runtime: Any, steps: int, prompt: str, seeds: int) -> dict[str, list[float]]:
        if len(asked) == limit[0]:
            raise KeyboardInterrupt
        asked.append((steps, prompt))
        return {name: [float(k) + steps for k in range(seeds)] for name in runtime.student.scorers}

    monkeypatch.setattr(within, "_scores", scores)
    monkeypatch.setattr(within, "load", lambda bundle, *given: SimpleNamespace(student=read_student(bundle)))
    row = Scorer("scorers/bright.onnx", 1.0, 2.0, "heldout", "s", "bright")

    def again(seeds: int = 3, stop: int = 100, **scorers: Scorer) -> int:
        """How many cells are drawn, of two prompts at two step counts."""
        rewrite_student(tmp_path, replace(tiny.student({}), scorers=scorers))
        asked.clear()
        limit[0] = stop
        if stop < 4:
            with pytest.raises(KeyboardInterrupt):
                within.add_within_prompt(tmp_path, PROMPTS, seeds, "auto", 1)
        else:
            within.add_within_prompt(tmp_path, PROMPTS, seeds, "auto", 1)
        return len(asked)

    changes: list[dict[str, Any]] = [
        {"bright": replace(row, mean=1.5)}, {"bright": replace(row, std=2.5)},
        {"bright": replace(row, source_sha256="t")}, {"bright": row, "dark": row}, {"bright": row, "seeds": 4},
    ]  # fmt: skip
    for change in changes:
        assert again(stop=3, bright=row) == 3 and again(bright=row) == 1
        assert again(stop=3, bright=row) == 3 and again(**change) == 4, change
