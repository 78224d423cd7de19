"""The laboratory: its statistics against closed forms, and two cells run for real on tiny models."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.shapes import small
from training.config import changed
from training.lab import cells, report, run, statistics
from training.progress import read_log
from training.rats.config import RatsConfig


def test_the_plan_compares_what_it_says() -> None:
    plan = cells.cells()
    assert len({cell.key for cell in plan}) == len(plan)
    main = [cell for cell in plan if cell.part == "main"]
    runs = (len(cells.METHODS) + len(cells.VARIANTS)) * len(cells.NFES)
    assert len(main) == runs * len(cells.SEEDS)
    for cell in plan:
        assert cell.config.student.nfe == (cell.nfe,) and cell.expected_s > 0
    rats, other = (next(c for c in plan if c.method == m and c.nfe == 4) for m in ("RATS", "constant gate"))
    assert changed(other.config, {"gate.kind": "reward"}) == rats.config


def test_the_error_of_one_seed_is_that_of_the_prompts() -> None:
    values = [1.0, 2.0, 3.0, 6.0]
    found = statistics.estimate([values])
    assert found.mean == 3.0 and found.seeds == 1
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))


def test_seeds_that_differ_add_to_the_error() -> None:
    """No prompt differs from another; the seeds' means are 0 and 1."""
    found = statistics.estimate([[0.0] * 9, [1.0] * 9])
    assert found.mean == 0.5 and found.error == pytest.approx(math.sqrt(0.5 / 2))


def test_pairing_takes_out_what_prompts_share() -> None:
    gen = np.random.default_rng(1)
    prompts = gen.normal(0, 10, 400)
    noise = gen.normal(0, 0.1, 400)
    found = statistics.difference([list(prompts + 0.05 + noise)], [list(prompts)])
    assert found.error < 0.01 and found.mean == pytest.approx(0.05, abs=0.02) and found.holds


def test_a_reference_of_one_run_is_paired_with_every_seed() -> None:
    found = statistics.difference([[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0]])
    assert found.mean == pytest.approx(1.5) and found.seeds == 2


def test_the_area_is_the_best_quality_at_that_diversity_or_more() -> None:
    assert statistics.area_under([(1.0, 0.8)], 0.7, 1.0) == pytest.approx(0.8)
    assert statistics.area_under([(0.85, 0.8)], 0.7, 1.0) == pytest.approx(0.4, abs=0.01)
    both = statistics.area_under([(0.85, 0.9), (1.0, 0.7)], 0.7, 1.0)
    assert both == pytest.approx(0.8, abs=0.01)
    assert statistics.area_under([(0.85, 0.9), (1.0, 0.7), (0.8, 0.6)], 0.7, 1.0) == both, "a worse point costs nothing"
    with pytest.raises(ValueError, match="points"):
        statistics.area_under([], 0.7, 1.0)


def test_clustered_errors_are_those_of_seeds_and_prompts() -> None:
    gen = np.random.default_rng(2)
    seeds, prompts = 30, 400
    table = gen.normal(0, 0.3, (seeds, 1)) + gen.normal(0, 1.0, (1, prompts)) + gen.normal(0, 0.1, (seeds, prompts))
    _, error, _ = statistics.clustered(table)
    assert error == pytest.approx(math.sqrt(0.3**2 / seeds + 1 / prompts), rel=0.25)
    _, alone, none = statistics.clustered(np.repeat(table[:1] - table[:1].mean(), 5, 0))
    assert alone == pytest.approx(1 / math.sqrt(prompts), rel=0.15) and none > 0.5, "five copies of a run are one run"
    assert statistics.clustered(table + 2)[2] < 0.001


def test_holm_is_stricter_the_more_claims_there_are() -> None:
    assert statistics.holm([0.04]) == [True]
    assert statistics.holm([0.04, 0.03, 0.2]) == [False, False, False]
    assert statistics.holm([0.04, 0.001, 0.02]) == [True, True, True]
    assert statistics.holm([0.06, 0.001, 0.02]) == [False, True, True]


def _row(method: str, nfe: int, diversity: float, seed: int = 401) -> run.Result:
    values = [0.0, 1.0, 2.0, 3.0]
    return run.Result(
        f"{method}-{nfe}-{seed}", method, "main", nfe, seed, values, values, {"right": values}, [diversity] * 4, values
    )


def test_what_is_paid_for_a_score_is_a_share_of_the_teachers_diversity() -> None:
    rows = [_row("teacher", 50, 4.0), _row("reward only", 4, 2.0), _row("RATS", 4, 3.0), _row("RATS", 4, 4.0, 402)]
    assert "reward only 50%, RATS 88%." in report._cost(report.Table(rows))
    assert report._cost(report.Table(rows[:1])) == ""


def test_the_gate_of_a_run_is_the_mean_over_its_steps() -> None:
    rows = [_row("RATS", 4, 1.0), _row("constant gate", 4, 1.0), _row("RATS", 8, 1.0)]
    steps = [
        {"gate_mean": 0.4, "gate_std": 0.1, "gap_std": 0.3, "share_ahead": 0.75},
        {"gate_mean": 0.6, "gate_std": 0.3, "gap_std": 0.5, "share_ahead": 0.25},
    ]
    logs = {rows[0].key: steps, rows[1].key: [{**step, "gate_std": 0.0} for step in steps], rows[2].key: steps}
    lines = [line for line in report._gates(report.Table(rows), logs).splitlines() if "401" in line]
    assert lines == ["| RATS | 401 | 0.50 | 0.20 | 0.40 | 0.50 |"]
    assert report._gates(report.Table(rows), {}) == ""


def test_the_first_paragraph_says_what_holds_and_what_does_not() -> None:
    gen = np.random.default_rng(3)

    def row(method: str, nfe: int, level: float, seed: int) -> run.Result:
        values = list(level + gen.normal(0, 0.1, 64))
        return run.Result(
            f"{method}{nfe}{seed}", method, "main", nfe, seed, values, values, {"right": values}, values, values
        )

    rows = [row("teacher", nfe, 0.0, 0) for nfe in (50, 2, 4, 8)]
    levels = {
        ("RATS", 2): 2.0,
        ("RATS", 4): 1.0,
        ("RATS", 8): 1.0,
        ("constant gate", 4): 0.0,
        ("constant gate", 2): 3.0,
    }
    rows += [row(method, nfe, level, seed) for (method, nfe), level in levels.items() for seed in (1, 2)]
    first, claims = report._summary(report.Table(rows), 5).split("\n\n")[:2]
    found = {point.split(":")[0]: point.split("\n  - ")[1:] for point in f"\n{first}".split("\n- ")}
    (holds,) = (parts for opening, parts in found.items() if opening.endswith("these claims hold"))
    assert any(re.fullmatch(r"the gate beats a constant gate \(4 steps \+\d\.\d+\)", part) for part in holds)
    assert re.fullmatch(r"the gate beats a constant gate \(2 steps -\d\.\d+\)", *found["These are contradicted"])
    assert "is largest at 2 steps holds (+" in first and "5 of the planned runs are missing" in first
    assert len(found) - 1 <= 6, "the points of the list"
    line = next(line for line in claims.splitlines() if "gate" in line)
    assert re.search(r"\| does not hold, -\d\.\d+ ± \S+ \| holds, \+\d\.\d+ ± \S+ \| - \|", line)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({2: 2.0, 4: 1.0, 8: 1.0}, "holds"),
        ({2: 1.01, 4: 1.0, 8: 0.0}, "is not decided"),  # the largest of the three, and by nothing
        ({2: 1.0, 4: 1.01, 8: 0.0}, "is not decided"),
        ({2: 0.0, 4: 1.0, 8: 0.0}, "does not hold"),
    ],
)
def test_the_largest_gain_is_tested_and_not_only_the_largest_number(gains: dict[int, float], verdict: str) -> None:
    """Each gain has an error of about 0.1, and what all step counts of a prompt share is paired away."""
    gen = np.random.default_rng(5)
    prompts = gen.normal(0, 3, 64)

    def row(method: str, nfe: int, level: float) -> run.Result:
        noise = gen.normal(0, 0.6, 64)
        values = list(prompts + level + noise - noise.mean())
        return run.Result(f"{method}{nfe}", method, "main", nfe, 1, values, values, {"right": values}, values, values)

    rows = [row("teacher", nfe, 0.0) for nfe in gains] + [row("RATS", nfe, gain) for nfe, gain in gains.items()]
    found = report._largest_gain(report.Table(rows))
    assert found[-1].startswith(f"{verdict} (") and "more than at 8" in found[-1]
    assert report._largest_gain(report.Table(rows[:-1])) == []


def test_two_cells_are_run_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_models(tmp_path / "models")
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")

    def base() -> RatsConfig:
        models = tmp_path / "models"
        scorers = {
            "reward.trained": str(models / "shapes-scorers/trained"),
            "reward.heldout": str(models / "shapes-scorers/heldout"),
        }
        return changed(
            cells.base(),
            {
                "model": str(models / "shapes-teacher"),
                "teacher.reference_nfe": 6,
                "steps": 2,
                "optim.batch": 4,
                "compute.precision": "fp32",
                **scorers,
            },
        )

    monkeypatch.setattr(run, "base", base)
    monkeypatch.setattr(report, "base", base)
    monkeypatch.setattr("training.lab.plots.base", base)
    chosen = [
        replace(
            cell,
            config=changed(
                base(),
                {
                    "student.nfe": (4,),
                    "validation.every": 2,
                    "teacher.guided_steps": 1,
                    "gate.kind": cell.config.gate.kind,
                },
            ),
        )
        for cell in cells.cells()[:3]
        if cell.method in ("RATS", "constant gate")
    ]
    run.run_all(chosen, tmp_path / "lab")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").glob("*/result.json")}
    assert {path.parent.name for path in stamps} == {
        *(c.key for c in chosen),
        *(f"teacher-nfe{n}" for n in (2, 4, 6, 8)),
    }
    run.run_all(chosen, tmp_path / "lab")
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "a finished run was done again"
    found = run.results(tmp_path / "lab")
    assert all(len(row.heldout) == 64 and row.distance[0] >= 0 for row in found)
    assert next(row for row in found if row.key == "teacher-nfe6").distance == pytest.approx([0] * 64, abs=1e-5)
    logs = {row.key: read_log(tmp_path / "lab" / row.key / "log.jsonl") for row in found}
    report.write(found, tmp_path / "docs", missing=3, logs=logs)
    text = (tmp_path / "docs" / "README.md").read_text()
    first = text.split("\n\n")[2]
    assert "3 of the planned runs are missing" in first and "the gate beats a constant gate " in first
    assert "What the gate did" in text and (tmp_path / "docs" / "frontier.png").stat().st_size > 10_000
    assert "the gate beats a constant gate at 4 steps (diversity)".capitalize() in text
    assert (tmp_path / "docs" / "curves.png").stat().st_size > 20_000
    assert (tmp_path / "docs" / "quality.png").stat().st_size > 5_000
    assert len((tmp_path / "docs" / "cells.csv").read_text().splitlines()) == 1 + len(found)
