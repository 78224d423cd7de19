"""The laboratory's plan, outcome and statistics against closed forms, and its report."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.config import ConfigError, changed
from training.lab import cells, outcome, references, report, run, statistics, stops
from training.lab.gates import OTHERS, SWAPPED

PROMPTS = ["a red star", "a red heart", "a blue circle", "a red ring above a blue star", "a black cross"]


# The plan


def test_the_main_comparison_comes_first_and_within_its_hours() -> None:
    plan = cells.cells(Path("teachers"))
    assert len({cell.key for cell in plan}) == len(plan)
    main = plan[: 12 * len(cells.SEEDS)]
    assert {cell.part for cell in main} == {"main"} and "main" not in {cell.part for cell in plan[len(main) :]}
    assert {cell.method for cell in main} == set(cells.MAIN) and {cell.config.seed for cell in main[:12]} == {401}
    assert sum(cell.expected_s for cell in main) < 3.2 * 3600
    assert sum(cell.expected_s for cell in plan) < 12 * 3600
    assert {cell.method for cell in plan} == set(cells.METHODS)
    added = [cell for cell in plan if cell.method == cells.CONFIDENCE]
    assert {cell.part for cell in added} == {"confidence"} and len(added) == 2 * 3 * len(cells.SEEDS)
    assert {cell.config.gate.kind for cell in added} == {"confidence"}


def test_methods_differ_in_what_they_say_and_nothing_else() -> None:
    plan = cells.cells(Path("teachers"))
    rats = next(cell for cell in plan if cell.key == "heterogeneous-rats-alpha-8-seed401")
    shuffled = next(cell for cell in plan if cell.key == "heterogeneous-shuffled-gate-alpha-8-seed401")
    assert changed(shuffled.config, {"gate.kind": "reward"}) == rats.config
    rates = [cell.config.optim.lr for cell in plan if cell.key.startswith("good-reward-only") and "401" in cell.key]
    assert rates == [2e-4, 4e-4, 8e-4]
    config = rats.config
    assert config.model == "teachers/heterogeneous" and config.student.nfe == (1, 2) and config.optim.batch == 64
    assert (
        config.teacher.guidance == 1 and not config.teacher.restart and 0 < config.teacher.guided_steps < config.steps
    )


# The area under the envelope


def test_the_area_is_that_of_the_best_quality_at_that_diversity_or_more() -> None:
    def area(points: list[tuple[float, float]]) -> float:
        diversity, quality = np.array(points).T
        return float(statistics.area(diversity, quality, 0.7, 1.0))

    assert area([(1.0, 0.8)]) == pytest.approx(0.8)
    assert area([(1.4, 0.8)]) == pytest.approx(0.8), "more diversity than the teacher's counts as the teacher's"
    assert area([(0.85, 0.8)]) == pytest.approx(0.4), "nothing is reached above the most varied point"
    assert area([(0.6, 0.9)]) == 0.0
    both = area([(0.85, 0.9), (1.0, 0.7)])
    assert both == pytest.approx((0.15 * 0.9 + 0.15 * 0.7) / 0.3)
    assert area([(0.8, 0.6), (1.0, 0.7), (0.85, 0.9)]) == pytest.approx(both), "a worse point costs nothing"
    assert area([(1.0, 0.9), (0.8, 0.5)]) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="0 points"):
        statistics.area(np.empty(0), np.empty(0), 0.7, 1.0)


def test_the_area_is_the_mean_height_of_the_envelope_for_many_curves_at_once() -> None:
    gen = np.random.default_rng(1)
    diversity, quality = gen.uniform(0.5, 1.1, (20, 7)), gen.uniform(0, 1, (20, 7))
    found = statistics.area(diversity, quality, 0.7, 1.0)
    at = np.linspace(0.7, 1.0, 3001)
    for row in range(20):
        assert found[row] == pytest.approx(statistics.envelope(diversity[row], quality[row], at).mean(), abs=2e-3)


# Errors and corrections


def test_the_error_counts_seeds_and_prompts() -> None:
    """x = seed's effect + prompt's effect: the variance of the mean is s^2 / S + p^2 / P."""
    gen = np.random.default_rng(2)
    seeds, prompts = 30, 400
    table_SP = gen.normal(0, 0.3, (seeds, 1)) + gen.normal(0, 1.0, (1, prompts))
    counts = statistics.resampled_counts(prompts, 1500)
    found = statistics.estimate(table_SP.mean(1), counts @ table_SP.T / prompts, prompts)
    expected = math.sqrt(table_SP.mean(1).var(ddof=1) / seeds + table_SP.mean(0).var(ddof=1) / prompts)
    assert found.error == pytest.approx(expected, rel=0.06) and found.mean == pytest.approx(table_SP.mean())
    copies = np.repeat(table_SP[:1], 5, 0)
    alone = statistics.estimate(copies.mean(1), counts @ copies.T / prompts, prompts)
    assert alone.error == pytest.approx(copies[0].std() / math.sqrt(prompts), rel=0.06), "five copies of a run are one"
    single = statistics.estimate(table_SP[:1].mean(1), counts @ table_SP[:1].T / prompts, prompts)
    assert single.p_value == 1.0 and single.seeds == 1


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.3, 0.2), (0.02, 1.0)])
def test_five_seeds_reject_a_true_null_as_often_as_they_say(of_seeds: float, of_prompts: float) -> None:
    gen = np.random.default_rng(7)
    counts = statistics.resampled_counts(60, 200)
    p_values = []
    for _ in range(400):
        table_SP = gen.normal(0, of_seeds, (5, 1)) + gen.normal(0, of_prompts, (1, 60)) + gen.normal(0, 0.3, (5, 60))
        p_values.append(statistics.estimate(table_SP.mean(1), counts @ table_SP.T / 60, 60).p_value)
    rejected = float(np.mean(np.array(p_values) < 0.05))
    assert 0.01 < rejected < 0.085, "0.05 ± 0.011 by chance"


def test_the_tail_of_students_t_against_closed_forms() -> None:
    for t in (0.0, 0.5, 2.0, 6.0):
        assert statistics.student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-6)
        assert statistics.student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-6)
    assert statistics.student_tail(2.776445, 4) == pytest.approx(0.025, abs=1e-6), "the table's value"
    assert statistics.student_tail(1.959964, 1e6) == pytest.approx(0.025, abs=1e-5), "the normal distribution's"


def test_holm_gives_the_p_values_that_are_known() -> None:
    """The first as of R's p.adjust(c(.01, .04, .03, .005), "holm")."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.04]) == [0.04]
    assert statistics.holm([0.5, 0.6, 0.7]) == [1.0, 1.0, 1.0]


# The outcome


def _figures(right: list[float], diversity: list[float]) -> stops.Figures:
    return stops.Figures(right, [0.5] * len(right), [0.25] * len(right), diversity)


def _run(method: str, seed: int, points: list[tuple[int, float, float, float]], teacher: str = "good") -> run.Result:
    """A run whose stopping times are (step, right, diversity, selecting score), the same for 1 and 2 steps."""
    num = len(PROMPTS)
    found = [
        stops.Stop(step, nfe, selecting, _figures([right] * num, [diversity] * num), {})
        for step, right, diversity, selecting in points
        for nfe in cells.NFES
    ]
    return run.Result(f"{teacher}-{method}-{seed}-{len(points)}", teacher, method, "", "main", seed, 60.0, found)


def _outcome(results: list[run.Result]) -> outcome.Outcome:
    num = len(PROMPTS)
    known = {name: _figures([right] * num, [2.0] * num) for name, right in REFERENCES.items()}
    return outcome.Outcome(results, PROMPTS, known, resamples=200)


REFERENCES = {
    references.TRUTH: 1.0,
    references.AUTOENCODER: 0.96,
    references.teacher_name("good"): 0.9,
    references.teacher_name("heterogeneous"): 0.7,
}


def test_the_outcome_is_the_area_over_the_sweep_as_a_share_of_the_good_teachers_diversity() -> None:
    sweep = [_run("RATS", 401, [(0, 0.1, 2.2, 0.0), (20, 0.9, 1.7, 1.0)]), _run("RATS", 401, [(20, 0.7, 2.0, 0.0)])]
    found = _outcome(sweep).estimate("good", "RATS")
    assert found is not None and found.seeds == 1
    assert found.mean == pytest.approx((0.15 * 0.9 + 0.15 * 0.7) / 0.3)
    assert _outcome(sweep).by_seed("good", "RATS") == {401: pytest.approx(found.mean)}
    assert _outcome(sweep).area_of(_figures([0.9] * 5, [4.0] * 5)) == pytest.approx(0.9)


def test_strata_are_those_of_the_prompts() -> None:
    right = [1.0 if word in prompt else 0.0 for prompt in PROMPTS for word in ["star"]]
    stop = stops.Stop(20, 1, 0.0, _figures(right, [2.0] * 5), {})
    one = run.Result("x", "good", "RATS", "", "main", 401, 1.0, [stop, replace(stop, nfe=2)])
    found = _outcome([one])
    areas = [found.by_seed("good", "RATS", stratum)[401] for stratum in (SWAPPED, OTHERS, outcome.BOTH)]
    assert areas == pytest.approx([2 / 3, 0.0, 0.4])


def test_reward_only_is_stopped_where_the_selecting_scorer_is_best() -> None:
    points = [(0, 0.1, 2.0, 0.0), (20, 0.5, 2.0, 0.9), (40, 0.8, 2.0, 0.7)]
    found = _outcome([_run("reward only", 401, points), _run("RATS", 401, points)])
    assert found.by_seed("good", "reward only")[401] == pytest.approx(0.5)
    assert found.by_seed("good", "RATS")[401] == pytest.approx(0.8)


def _seeds(method: str, level: float, spread: float = 0.01) -> list[run.Result]:
    return [
        _run(method, seed, [(20, level + spread * (i - 2), 2.0, 0.0)], "heterogeneous")
        for i, seed in enumerate(cells.SEEDS)
    ]


def test_claims_need_all_seeds_and_say_what_holds() -> None:
    rows = _seeds("RATS", 0.8) + _seeds("constant gate", 0.6, -0.01) + _seeds("shuffled gate", 0.81, -0.02)
    rows += _seeds("reward only", 0.9, -0.01)
    found = {claim.letter: claim for claim in _outcome(rows).claims("heterogeneous")}
    assert [found[letter].verdict for letter in "ABC"] == ["holds", "is not decided", "is contradicted"]
    assert found["C"].ours == "shuffled gate" and found["A"].difference.mean == pytest.approx(0.2)
    assert found["A"].p_value > 2.9 * found["A"].difference.p_value, "corrected for three"
    assert not _outcome(rows).added_claims("heterogeneous")
    added = _outcome([*rows, *_seeds("confidence gate", 0.85, 0.01)])
    later = {claim.letter: claim for claim in added.added_claims("heterogeneous")}
    assert {letter: (claim.ours, claim.theirs) for letter, claim in later.items()} == {
        letter: ("confidence gate", other)
        for letter, other in {"D": "RATS", "E": "constant gate", "F": "reward only"}.items()
    }
    assert later["D"].difference.mean == pytest.approx(0.05) and later["F"].verdict == "is contradicted"
    assert [claim.p_value for claim in added.claims("heterogeneous")] == [found[letter].p_value for letter in "ABC"]
    few = _outcome([row for row in rows if row.seed != 405 or row.method != "constant gate"])
    assert [claim.letter for claim in few.claims("heterogeneous")] == ["B", "C"]


def test_the_best_of_two_gates_is_compared_as_one_of_two() -> None:
    noisy = [0.03, -0.02, 0.05, 0.01, -0.04]
    gates = {
        name: [
            _run(name, seed, [(20, level + off, 2.0, 0.0)], "heterogeneous")
            for seed, off in zip(cells.SEEDS, noisy, strict=True)
        ]
        for name, level in (("RATS", 0.76), ("shuffled gate", 0.75))
    }
    reward = _seeds("reward only", 0.7)
    *_, both = _outcome([*gates["RATS"], *gates["shuffled gate"], *reward]).claims("heterogeneous")
    *_, alone = _outcome([*gates["RATS"], *reward]).claims("heterogeneous")
    assert both.letter == alone.letter == "C"
    p = both.difference.p_value
    assert both.ours == alone.ours == "RATS" and alone.difference.p_value == pytest.approx(p) and 1e-6 < p < 0.1
    assert alone.p_value == pytest.approx(3 * p) and both.p_value == pytest.approx(2 * 2 * p), "B is certain"


def test_half_a_sweep_is_left_out_where_a_whole_one_is_there() -> None:
    plan = cells.cells(Path("teachers"))
    made = [
        run.Result(cell.key, cell.teacher, cell.method, cell.strength, cell.part, cell.config.seed, 1.0, [])
        for cell in plan
        if (cell.teacher, cell.method) in (("heterogeneous", "RATS"), ("good", "reward only"))
    ]
    some = [
        one
        for one in made
        if (one.method == "RATS" and (one.seed == 401 or (one.seed, one.strength) == (402, "alpha 2")))
        or (one.method == "reward only" and (one.seed, one.strength) == (403, "rate 1"))
    ]
    assert len(some) == 5
    assert [(one.method, one.seed) for one in run.complete(some, plan)] == [("RATS", 401)] * 3 + [("reward only", 403)]
    assert run.complete(made, plan) == made


def test_half_a_sweep_with_one_teacher_stays_whatever_is_whole_with_the_other() -> None:
    plan = cells.cells(Path("teachers"))
    of_401 = [one for one in plan if (one.method, one.config.seed) == ("RATS", 401)]
    made = [
        run.Result(cell.key, cell.teacher, cell.method, cell.strength, cell.part, 401, 1.0, [])
        for cell in of_401
        if cell.teacher == "heterogeneous" or cell.strength == "alpha 2"
    ]
    assert [one.teacher for one in made].count("good") == 1 < [one.teacher for one in made].count("heterogeneous")
    assert run.complete(made, plan) == made


def test_a_trial_is_not_mixed_with_the_plan() -> None:
    short = stops.Stop(2, 1, 0.0, _figures([1.0], [1.0]), {})
    with pytest.raises(ConfigError, match="different folders"):
        _outcome([run.Result("x", "good", "RATS", "", "main", 401, 1.0, [short])])


def test_the_report_says_what_is_known_and_what_is_missing(tmp_path: Path) -> None:
    rows = (
        _seeds("RATS", 0.8) + _seeds("constant gate", 0.6) + _seeds("shuffled gate", 0.8) + _seeds("reward only", 0.5)
    )
    report.write(_outcome(rows), tmp_path, 3, {"heterogeneous": {"right": 0.7, "right_swapped": 0.4}})
    text = (tmp_path / "README.md").read_text()
    assert "3 of the planned runs are missing" in text and "right swapped 0.400" in text
    assert "| A | RATS beats constant gate | heterogeneous | +0.200 ± " in text and "**holds**" in text
    assert "| *rendered truth* |  | 1.000 | 1.000 | 1.000 |" in text
    assert "| *truth through the autoencoder* |  |  |  | 0.960 |" in text
    assert "| heterogeneous | " in text.split("until it gets worse")[1]
    assert (tmp_path / "curves-heterogeneous.png").stat().st_size > 10_000
    assert len((tmp_path / "areas.csv").read_text().splitlines()) == 1 + 4 + 20
    assert "| RATS | 5 | 0.800 ± 0.0" in text and not re.search(r"± 0\.\d+\*", text)
    report.write(_outcome(rows[:1]), tmp_path, 119, {})
    assert re.search(r"\| RATS \| 1 \| 0\.\d+ ± 0\.\d+\* \|", (tmp_path / "README.md").read_text())
    again = [replace(rows[0], weights="a"), replace(rows[1], weights="b")]
    report.write(_outcome(again), tmp_path, 118, {})
    assert "The heterogeneous teacher was trained 2 times" in (tmp_path / "README.md").read_text()
    report.write(_outcome(rows[:2]), tmp_path, 118, {})
    assert "was trained" not in (tmp_path / "README.md").read_text()
    assert "None has the results of all 5 seeds yet" in (tmp_path / "README.md").read_text()


def test_the_degrees_of_freedom_are_satterthwaites() -> None:
    seeds, prompts = 5, 60
    table_SP = 0.1 * np.arange(seeds)[:, None] + np.random.default_rng(3).normal(0, 1.0, (1, prompts))
    counts = statistics.resampled_counts(prompts, 400)
    found = statistics.estimate(table_SP.mean(1), counts @ table_SP.T / prompts, prompts)
    of_seeds = 0.1**2 * 2.5 / seeds  # 2.5: the variance of 0 to 4
    of_prompts = found.error**2 - of_seeds
    expected = found.error**4 / (of_seeds**2 / (seeds - 1) + of_prompts**2 / (prompts - 1))
    assert of_prompts > 2 * of_seeds and found.freedom == pytest.approx(expected)
