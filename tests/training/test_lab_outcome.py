"""The laboratory's outcome and report on results of which every prompt, step count, seed and teacher differs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from training.lab import cells, outcome, plots, references, report, run, statistics, stops, teachers
from training.lab.gates import OTHERS, SWAPPED
from training.prompts import Prompts

PROMPTS = [
    "a red star",
    "a blue circle",
    "a red heart",
    "a black cross",
    "a ring above a star",
    "a ring",
    "a green bar",
]
STRATA = {outcome.BOTH: range(7), SWAPPED: (0, 2, 4), OTHERS: (1, 3, 5, 6)}
SEEDS, STEPS, RESAMPLES = cells.SEEDS, (0, 30, 60), 60
LOW, HIGH = outcome.LOW, outcome.HIGH
METHODS = ("RATS", "constant gate", "shuffled gate", "reward only", "confidence gate")
Points = list[tuple[float, float]]


def figures(gen: np.random.Generator, varied: float = 1.0) -> stops.Figures:
    right, trained, heldout = (gen.uniform(0, 1, len(PROMPTS)).tolist() for _ in range(3))
    return stops.Figures(right, trained, heldout, (varied * gen.uniform(1.5, 4, len(PROMPTS))).tolist())


def made(teacher: str, method: str, seed: int, strength: str, gen: np.random.Generator) -> run.Result:
    found = [
        stops.Stop(step, nfe, float(gen.uniform()) if step else 0.0, figures(gen, gen.uniform(0.4, 1.2)), {})
        for step in STEPS
        for nfe in cells.NFES
    ]
    key = f"{teacher}-{method}-{strength}-{seed}"
    return run.Result(key, teacher, method, strength, "main", seed, 90.0, found, f"weights of {teacher}")


@pytest.fixture(scope="module")
def found() -> outcome.Outcome:
    gen = np.random.default_rng(5)
    results = [
        made(teacher, method, seed, strength, gen)
        for teacher in teachers.TEACHERS
        for method in METHODS
        for seed in SEEDS
        for strength in ("alpha 2", "alpha 8")
    ]
    names = [references.TRUTH, references.AUTOENCODER, *map(references.teacher_name, teachers.TEACHERS)]
    known = {name: figures(gen) for name in names}
    return outcome.Outcome(results, PROMPTS, known, resamples=RESAMPLES)


CHECKED = {"good": {"right": 0.875}, "heterogeneous": {"right": 0.25}}


def write(given: outcome.Outcome, folder: Path) -> list[tuple[Any, ...]]:
    """The report without its plots; returns what was to be plotted."""
    plotted: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "gates"):
            patch.setattr(report.plots, name, lambda *given, name=name: plotted.append((name, *given)))
        report.write(given, folder, 0, CHECKED)
    return plotted


@pytest.fixture(scope="module")
def folder(found: outcome.Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's."""
    made = tmp_path_factory.mktemp("report")
    assert write(found, made) == [
        *(("curves", found, teacher, made / f"curves-{teacher}.png") for teacher in teachers.TEACHERS),
        ("gates", found, made / "gates.png"),
    ]
    return made


def area(points: Points) -> float:
    """By intervals: the best of all that are at least as varied as the interval's upper end."""
    edges = sorted({LOW, HIGH, *(share for share, _ in points if LOW < share < HIGH)})
    total = 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        total += (high - low) * max((right for share, right in points if share >= high), default=0.0)
    return total / (HIGH - LOW)


def counts_of(run: run.Result) -> list[stops.Stop]:
    if run.method != "reward only":
        return run.stops
    best = max(stop.selecting for stop in run.stops)
    last = min(stop.step for stop in run.stops if stop.selecting == best)
    return [stop for stop in run.stops if stop.step <= last]


def points(
    given: outcome.Outcome, of: Sequence[stops.Figures], stratum: str, counts: Sequence[float] | None = None
) -> Points:
    at = list(STRATA[stratum])
    weights = np.ones(len(at)) if counts is None else np.asarray(counts)
    scale = np.average(np.array(given.references["good teacher"].diversity)[at], weights=weights)
    return [
        (
            float(np.average(np.array(one.diversity)[at], weights=weights) / scale),
            float(np.average(np.array(one.right)[at], weights=weights)),
        )
        for one in of
    ]


def sweep(given: outcome.Outcome, teacher: str, method: str, seed: int, nfe: int) -> list[stops.Figures]:
    runs = [one for one in given.results if (one.teacher, one.method, one.seed) == (teacher, method, seed)]
    return [stop.figures for one in runs for stop in counts_of(one) if stop.nfe == nfe]


def of_seed(
    given: outcome.Outcome, teacher: str, method: str, seed: int, stratum: str, counts: Sequence[float] | None = None
) -> float:
    """The mean over the step counts."""
    swept = [sweep(given, teacher, method, seed, nfe) for nfe in cells.NFES]
    return float(np.mean([area(points(given, one, stratum, counts)) for one in swept]))


@pytest.mark.parametrize("stratum", STRATA)
@pytest.mark.parametrize("teacher", teachers.TEACHERS)
@pytest.mark.parametrize("method", ["RATS", "reward only"])
def test_an_area_is_of_its_own_teacher_method_seed_and_stratum_and_of_both_step_counts(
    method: str, teacher: str, stratum: str, found: outcome.Outcome
) -> None:
    wanted = {seed: of_seed(found, teacher, method, seed, stratum) for seed in SEEDS}
    assert found.by_seed(teacher, method, stratum) == pytest.approx(wanted, rel=1e-9)
    estimated = found.estimate(teacher, method, stratum)
    assert estimated is not None and estimated.mean == pytest.approx(np.mean(list(wanted.values())), rel=1e-9)


@pytest.mark.parametrize(("stratum", "minus"), [(outcome.BOTH, ""), (SWAPPED, "constant gate"), (OTHERS, "RATS")])
def test_an_error_is_over_seeds_and_the_same_resamples_of_the_prompts_for_both_methods(
    stratum: str, minus: str, found: outcome.Outcome
) -> None:
    counts_BP = statistics.resampled_counts(len(STRATA[stratum]), RESAMPLES)

    def table(method: str) -> tuple[Any, Any]:
        measured = [of_seed(found, "good", method, seed, stratum) for seed in SEEDS]
        resampled = [[of_seed(found, "good", method, seed, stratum, row) for seed in SEEDS] for row in counts_BP]
        return np.array(measured), np.array(resampled)

    measured_S, resampled_BS = table("shuffled gate")
    if minus:
        other_S, other_BS = table(minus)
        measured_S, resampled_BS = measured_S - other_S, resampled_BS - other_BS
    wanted = statistics.estimate(measured_S, resampled_BS, len(STRATA[stratum]))
    estimated = found.estimate("good", "shuffled gate", stratum, minus)
    assert estimated is not None
    for name in ("mean", "error", "freedom", "p_value"):
        assert getattr(estimated, name) == pytest.approx(getattr(wanted, name), rel=1e-6), name
    assert estimated.seeds == len(SEEDS) and wanted.error > 0


def test_a_difference_is_over_the_seeds_that_both_methods_have(found: outcome.Outcome) -> None:
    few = replace(found, results=[one for one in found.results if (one.method, one.seed) != ("RATS", 402)], _counts={})
    lead = few.estimate("good", "constant gate", minus="RATS")
    assert lead is not None and lead.seeds == 4
    apart = [
        of_seed(found, "good", "constant gate", seed, outcome.BOTH) - of_seed(found, "good", "RATS", seed, outcome.BOTH)
        for seed in SEEDS
        if seed != 402
    ]
    assert lead.mean == pytest.approx(np.mean(apart), rel=1e-9)
    assert few.estimate("good", "no such method") is None


def test_of_equal_selecting_scores_the_earlier_one_stops_reward_only(found: outcome.Outcome) -> None:
    one = next(one for one in found.results if one.method == "reward only")
    level = replace(one, stops=[replace(stop, selecting=float(stop.step > 0)) for stop in one.stops])
    assert [(stop.step, stop.nfe) for stop in outcome.counted(level)] == [(0, 1), (0, 2), (30, 1), (30, 2)]


def rows(text: str, section: str) -> list[list[str]]:
    """The table's rows below a heading."""
    lines = text.split(section, 1)[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("| ")][2:]


def best(given: outcome.Outcome, teacher: str, method: str) -> list[stops.Figures]:
    """Of each seed and step count what the judge likes best, of those that are varied enough."""
    chosen = []
    for seed in SEEDS:
        for nfe in cells.NFES:
            swept = sweep(given, teacher, method, seed, nfe)
            shares = points(given, swept, outcome.BOTH)
            varied = [(right, k) for k, (share, right) in enumerate(shares) if share >= LOW]
            chosen += [swept[max(varied)[1]]] if varied else []
    return chosen


def test_every_number_of_the_report_is_that_of_its_row_and_column(found: outcome.Outcome, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    for teacher, checked in (("good", "right 0.875"), ("heterogeneous", "right 0.250")):
        section = f"## With the {references.teacher_name(teacher)}\n"
        assert f"on the validation prompts: {checked}." in text.split(section)[1].split("\n## ")[0]
        table = {row[0]: row[1:] for row in rows(text, section)}
        own = references.teacher_name(teacher)
        assert list(table) == [
            f"*{references.TRUTH}*", f"*{references.AUTOENCODER}*", f"*{own}*", "RATS", "constant gate",
            "shuffled gate", "reward only", "confidence gate",
        ]  # fmt: skip
        for name in (references.TRUTH, references.AUTOENCODER, own):
            one = found.references[name]
            areas = [f"{area(points(found, [one], stratum)):.3f}" for stratum in STRATA]
            means = [f"{np.mean(values):.3f}" for values in (one.right, one.trained, one.heldout)]
            assert table[f"*{name}*"] == ["", *areas, *means]
        for method in METHODS:
            estimates = [found.estimate(teacher, method, stratum) for stratum in STRATA]
            areas = [f"{one.mean:.3f} ± {one.error:.3f}" for one in estimates if one]
            chosen = best(found, teacher, method)
            means = [f"{np.mean([getattr(one, name) for one in chosen]):.3f}" for name in report.SHOWN]
            assert table[method] == ["5", *areas, *means] and len(set(areas)) == 3
    titles = [text.index(f"## With the {references.teacher_name(name)}") for name in ("heterogeneous", "good")]
    assert titles == sorted(titles), "the claims are about the first"


def test_the_files_areas_are_by_teacher_method_seed_and_stratum(found: outcome.Outcome, folder: Path) -> None:
    with (folder / "areas.csv").open(newline="") as file:
        head, *lines = list(csv.reader(file))
    assert head == ["teacher", "method", "seed", *(f"area, {stratum}" for stratum in STRATA)]
    kept = {tuple(line[:3]): [float(value) for value in line[3:]] for line in lines}
    for name, one in found.references.items():
        assert kept.pop((name, "", "")) == pytest.approx(
            [area(points(found, [one], stratum)) for stratum in STRATA], abs=1e-5
        )
    wanted = {
        (teacher, method, str(seed)): [of_seed(found, teacher, method, seed, stratum) for stratum in STRATA]
        for teacher in teachers.TEACHERS
        for method in METHODS
        for seed in SEEDS
    }
    assert kept.keys() == wanted.keys()
    assert all(kept[key] == pytest.approx(values, abs=1e-5) for key, values in wanted.items())


def test_registered_and_added_claims_stand_each_in_its_section(found: outcome.Outcome, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    kinds: dict[str, Callable[[str], list[outcome.Claim]]] = {
        "## The three claims": found.claims, "## The confidence gate": found.added_claims,
    }  # fmt: skip
    for section, of in kinds.items():
        wanted = [
            [one.letter, f"{one.ours} beats {one.theirs}", teacher, str(one.difference), f"{one.p_value:.3f}"]
            for teacher in ("heterogeneous", "good")
            for one in of(teacher)
        ]
        assert [row[:5] for row in rows(text, section)] == wanted and len(wanted) == 6
    letters = [claim.letter for of in kinds.values() for claim in of("good")]
    assert letters == list("ABCDEF")


def test_claims_that_were_added_are_corrected_for_themselves(found: outcome.Outcome) -> None:
    for of, pairs in (
        (found.claims, {"A": ("RATS", "constant gate"), "B": ("RATS", "shuffled gate")}),
        (found.added_claims, {"D": "RATS", "E": "constant gate", "F": "reward only"}),
    ):
        for teacher in teachers.TEACHERS:
            made = {claim.letter: claim for claim in of(teacher)}
            for letter, names in pairs.items():
                ours, theirs = names if isinstance(names, tuple) else ("confidence gate", names)
                lead = found.estimate(teacher, ours, minus=theirs)
                assert lead is not None and (made[letter].ours, made[letter].theirs) == (ours, theirs)
                assert made[letter].difference == lead
            if "D" in made:
                plain = [made[letter].difference.p_value for letter in "DEF"]
                assert [made[letter].p_value for letter in "DEF"] == pytest.approx(statistics.holm(plain))


def test_a_teacher_that_was_made_anew_is_said_to_have_been(found: outcome.Outcome, tmp_path: Path) -> None:
    other = [replace(one, weights="other") if one.seed == 405 else one for one in found.results]
    mixed = [
        one
        for one, old in zip(other, found.results, strict=True)
        if old.teacher == "good" or one.weights == old.weights
    ]
    write(replace(found, results=mixed, _counts={}), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "The good teacher was trained 2 times, on different machines." in text
    assert (
        "heterogeneous teacher was trained" not in text
        and f"{len(mixed)} runs took {len(mixed) * 90 / 3600:.1f}" in text
    )


def test_reward_only_is_listed_run_by_run_with_its_best_and_its_last(found: outcome.Outcome, folder: Path) -> None:
    table = rows((folder / "README.md").read_text(), "## Reward only, until it gets worse")
    known = [(row[0], row[4]) for row in table if row[0].startswith("*")]
    names = [references.TRUTH, references.AUTOENCODER, "good teacher", "heterogeneous teacher"]
    assert known == [(f"*{name}*", f"{np.mean(found.references[name].right):.3f}") for name in names]
    wanted = []
    for one in found.results:
        if one.method == "reward only":
            for nfe in cells.NFES:
                right = {stop.step: float(np.mean(stop.figures.right)) for stop in one.stops if stop.nfe == nfe}
                at = max(right, key=lambda step: right[step])
                cut = [f"{right[at]:.3f}", str(at), f"{right[60]:.3f}", "60"]
                wanted.append([one.teacher, one.strength, str(one.seed), str(nfe), *cut])
    assert [row for row in table if not row[0].startswith("*")] == wanted


def test_each_panel_of_the_curves_is_of_its_own_step_count_and_stratum(
    found: outcome.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[Figure, Path]] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append((figure, path)))
    plots.curves(found, "heterogeneous", Path("x"))
    [(figure, path)] = kept
    panels = [(nfe, stratum) for nfe in cells.NFES for stratum in STRATA]
    assert path == Path("x") and len(figure.axes) == len(panels)
    for axis, (nfe, stratum) in zip(figure.axes, panels, strict=True):
        assert axis.get_title() == f"{stratum}, {nfe} step{'s' if nfe > 1 else ''}"
        lines: Mapping[str, Any] = {str(line.get_label()): line for line in axis.lines}
        for method in METHODS:
            shares, heights = lines[f"{method} (5)"].get_data()
            swept = [points(found, sweep(found, "heterogeneous", method, seed, nfe), stratum) for seed in SEEDS]
            for at in range(0, len(shares), 7):
                own = [max((right for share, right in one if share >= shares[at]), default=0.0) for one in swept]
                assert heights[at] == pytest.approx(np.mean(own), abs=1e-9)
        for name in (references.TRUTH, references.AUTOENCODER):
            assert lines[name].get_ydata()[0] == pytest.approx(points(found, [found.references[name]], stratum)[0][1])
        star = lines["its teacher"]
        [own_point] = points(found, [found.references["heterogeneous teacher"]], stratum)
        assert (float(star.get_xdata()[0]), float(star.get_ydata()[0])) == pytest.approx(own_point)
    assert figure.axes[0].get_shared_x_axes().joined(*figure.axes[:2])
    assert "heterogeneous teacher" in figure.get_suptitle()
    plt.close(figure)


@dataclass(frozen=True)
class Prepared:
    """What a laboratory's run reads of a setup."""

    prompts: Prompts


def test_a_check_is_judged_on_the_validation_prompts_and_a_repetition_on_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Path]] = []
    cell: Any = SimpleNamespace(key="its-key", config="its configuration")
    result = run.Result("its-key", "good", "RATS", "", "main", 401, 1.0, [])

    def make(cell: Any, setup: Prepared, place: Path) -> None:
        asked.append((setup.prompts.test, place))
        place.mkdir(parents=True)
        run._keep(place, result)

    monkeypatch.setattr(run, "prepare", lambda config: Prepared(Prompts(lambda step, num: [], ["c"], ["v"], ["t"])))
    monkeypatch.setattr(run, "_run", make)
    for _ in range(2):
        assert run.check(cell, tmp_path) == [] and run.again(cell, tmp_path / "repeat") == result
    assert asked == [(["v"], tmp_path / "check" / "its-key"), (["t"], tmp_path / "repeat" / "its-key")], "each once"


def test_the_good_teacher_is_the_starter_worlds_and_the_other_one_has_learnt_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []

    def distilled(name: str, source: Path, folder: Path, config: teachers.TeachersConfig) -> None:
        assert folder == tmp_path
        done.append((name, source))
        (folder / name).mkdir()

    monkeypatch.setattr(teachers, "_swapped", lambda folder, config: folder / "swapped")
    monkeypatch.setattr(teachers, "_distilled", distilled)
    monkeypatch.setattr(teachers, "checked", lambda path: {"right": float(len(path.name))})
    config = teachers.TeachersConfig(start="the/start")
    figures = {"good": {"right": 4.0}, "heterogeneous": {"right": 13.0}}
    assert teachers.make(tmp_path, config) == figures
    assert done == [("good", Path("the/start")), ("heterogeneous", tmp_path / "swapped")]
    monkeypatch.setattr(teachers, "checked", lambda path: pytest.fail("it was measured again"))
    assert teachers.make(tmp_path, config) == figures and len(done) == 2
