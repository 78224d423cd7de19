"""The laboratory's gates, locks, teachers and runs: cells trained for real on tiny models."""

from __future__ import annotations

import multiprocessing.synchronize
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from student.files import hash_weights
from tests.training.shapes import small
from training.config import changed
from training.experiment.setup import prepare
from training.lab import __main__ as command
from training.lab import cells, published, references, run, stops, teachers
from training.lab.gates import OTHERS, SWAPPED, RecordedGate
from training.progress import quiet
from training.rats.config import RatsConfig
from training.rats.gate import Gate
from training.rats.method import Batch

PROMPTS = ["a red star", "a red heart", "a blue circle"]


def test_the_gate_is_noted_by_stratum_and_not_changed() -> None:
    config = changed(RatsConfig(), {"gate.tau": 0.5})
    gate, batch = RecordedGate(config), Batch(0, 0, 1, PROMPTS, torch.zeros(3, 1))
    teacher, student = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])
    weights = gate.weights(teacher, student, batch)
    torch.testing.assert_close(weights, Gate(config).weights(teacher, student, batch))
    noted = gate.taken()
    assert noted[SWAPPED] == pytest.approx({"weight": float(weights[:2].mean()), "gap": 0.5})
    assert noted[OTHERS] == pytest.approx({"weight": float(weights[2]), "gap": -2.0})
    assert gate.taken() == {}


def _hold(place: Path, held: multiprocessing.synchronize.Event, free: multiprocessing.synchronize.Event) -> None:
    with run.alone(place) as mine:
        assert mine
        held.set()
        free.wait(30)


def test_a_cell_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "cell", held, free))
    other.start()
    assert held.wait(30)
    with run.alone(tmp_path / "cell") as mine, run.alone(tmp_path / "another") as also:
        assert not mine and also
    other.kill()  # as a crash would: nothing is given back by the process itself
    other.join(30)
    with run.alone(tmp_path / "cell") as mine:
        assert mine


def _tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> teachers.TeachersConfig:
    """Teachers and runs of seconds, on tiny untrained models."""
    quiet()
    small.write_models(folder / "models")
    monkeypatch.setattr("training.evaluate.CACHE", folder / "cache")
    monkeypatch.setattr(teachers, "CHECKED_NFE", 1)
    monkeypatch.setattr(teachers, "CHECKED_PROMPTS", 8)
    real = cells.base

    def base(teacher: Path) -> RatsConfig:
        scorers = {f"reward.{role}": str(folder / "models/shapes-scorers" / role) for role in ("trained", "heldout")}
        few = {"data.calibration": 4, "data.validation": 4, "data.validation_diversity": 1, "data.test": 6}
        return changed(real(teacher), {**scorers, **few, "optim.batch": 6, "compute.precision": "fp32"})

    for module in (cells, references):
        monkeypatch.setattr(module, "base", base)
    start = str(folder / "models/shapes-teacher")
    return teachers.TeachersConfig(start=start, swap_steps=2, distil_steps=2, batch=4, save_every=1)


def test_teachers_are_made_and_cells_run_kept_shared_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, lab = _tiny(tmp_path, monkeypatch), tmp_path / "lab"
    made = run.make_teachers(lab, config)
    assert set(made) == set(teachers.TEACHERS) and 0 <= made["good"]["right_others"] <= 1
    plan = cells.cells(lab / run.TEACHERS)
    wanted = ("heterogeneous-rats-alpha-8-seed401", "heterogeneous-disagreement-gate-alpha-8")
    chosen = [run.shortened(cell, 2) for cell in run.only(plan, wanted)]
    assert len(chosen) == 2
    with run.alone(lab / chosen[0].key):
        assert run.run_all(chosen, lab, 2) == 1, "what another process trains is left to it"
    assert [one.key for one in run.results(lab)] == [chosen[1].key]
    assert run.run_all(chosen, lab, 2) == 0
    stamps = {path: path.stat().st_mtime_ns for path in [*lab.glob("*/result.json"), lab / references.FILE]}
    assert run.run_all(chosen, lab, 2) == 0 and len(stamps) == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "what was finished was done again"
    found, (prompts, known) = run.results(lab), references.read(lab / references.FILE)
    for one in found:
        assert [(stop.step, stop.nfe) for stop in one.stops] == [(s, n) for s in (0, 1, 2) for n in cells.NFES]
        assert all(len(stop.figures.diversity) == len(prompts) == 6 for stop in one.stops)
        assert not (lab / one.key / "checkpoint.pt").exists() and (lab / one.key / "log.jsonl").exists()
    rats = next(one for one in found if one.method == "RATS")
    assert all(0 < stop.gate[s]["weight"] < 1 for stop in rats.stops[2:] for s in stop.gate) and rats.stops[2].gate
    assert known[references.TRUTH].right == [1.0] * 6 and min(known[references.TRUTH].diversity) > 1
    first = run.shortened(cells.check(lab / run.TEACHERS), 2)
    watched = run.check(replace(first, config=changed(first.config, {"data.validation": 2})), lab)
    assert [stop.step for stop in watched] == [0, 0, 1, 1, 2, 2] and run.results(lab) == found
    assert {len(stop.figures.right) for stop in watched} == {2}, "the evaluation prompts stay unseen"
    docs = tmp_path / "docs"
    for part in ("teachers", "check", "report"):  # all of it is done: nothing but the report is written
        command.main(part, out=lab, report=docs, known=docs, cell=["good"], steps=0, threads=0, plan=False)
    text = (docs / "README.md").read_text()
    assert "disagreement gate | 1 |" in text and f"{len(plan) - 2} of the planned runs are missing" in text
    assert (docs / "gates.png").stat().st_size > 5_000
    kept, network = published.read(docs), lab / "teachers/heterogeneous/transformer"
    assert kept.prompts == prompts and kept.results[0].weights == hash_weights(network)
    elsewhere = tmp_path / "elsewhere"
    _goes_on_from(kept, chosen, lab, elsewhere)
    command.main("report", out=elsewhere, report=tmp_path / "x", known=docs, cell=[], steps=0, threads=0, plan=False)
    assert (tmp_path / "x" / "README.md").read_text() == text, "from what is published alone, the teachers' figures too"
    _is_repeated(chosen[0], lab, docs, capsys)


def _goes_on_from(kept: published.Published, chosen: list[cells.Cell], lab: Path, elsewhere: Path) -> None:
    """Another machine takes over what was published, and runs none of it again."""
    changed_cell = replace(chosen[1], config=changed(chosen[1].config, {"optim.lr": 0.5}))
    assert published.take_over(kept, [chosen[0], changed_cell], elsewhere) == 1
    assert published.take_over(kept, chosen, elsewhere) == 1, "the other one, and nothing twice"
    assert published.take_over(kept, chosen, elsewhere) == 0
    for settings in kept.settings.values():
        del settings["data"]["copies"], settings["tracker"]  # as a release wrote it that did not know them yet
    assert published.take_over(kept, chosen, elsewhere.with_name("later")) == 2
    ours, theirs = run.results(elsewhere), run.results(lab)
    assert [one.key for one in ours] == [one.key for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert max(largest for *_, largest in published.difference(one, other).values()) < 1e-6


def test_a_difference_is_the_largest_of_any_prompt_at_any_stop() -> None:
    def result(*right: list[float]) -> run.Result:
        found = [stops.Stop(k, 1, 0.0, stops.Figures(each, each, each, each)) for k, each in enumerate(right)]
        return run.Result("x", "good", "RATS", "", "main", 401, 1.0, found)

    found = published.difference(result([0.5, 1.0], [0.0, 0.5]), result([0.5, 1.0], [0.75, 0.25]))
    assert found["right"] == (0.5, 0.625, 0.75) and len(found) == 4
    shorter = published.difference(result([0.5, 1.0]), result([0.5, 0.75], [0.0, 0.5]))
    assert shorter["right"] == (0.75, 0.625, 0.25) and published.difference(result(), result([0.5])) == {}


def _is_repeated(cell: cells.Cell, lab: Path, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.results(lab)
    command._repeat([cell], lab, published.read(docs))
    rows = [line for line in capsys.readouterr().err.splitlines() if "0.000000" in line or "0.000001" in line]
    assert len(rows) == 4 and run.results(lab) == before, "right, both scorers and diversity, each the same again"


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _tiny(tmp_path, monkeypatch)
    teachers_folder = tmp_path / "lab" / run.TEACHERS
    small.write_models(tmp_path / "again")
    (teachers_folder / "good").parent.mkdir(parents=True)
    Path(config.start).rename(teachers_folder / "good")
    cell = run.shortened(run.only(cells.cells(teachers_folder), ["good-rats-alpha-8-seed401"])[0], 2)
    run._run(cell, prepare(cell.config), tmp_path / "whole")
    real, calls = stops.write, []

    def write(found: list[stops.Stop], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(found, path)

    monkeypatch.setattr(stops, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run._run(cell, prepare(cell.config), tmp_path / "cut")
    monkeypatch.setattr(stops, "write", real)
    run._run(cell, prepare(cell.config), tmp_path / "cut")
    whole, cut = ((tmp_path / name / run.RESULT).read_text() for name in ("whole", "cut"))
    assert whole.split('"stops"')[1] == cut.split('"stops"')[1]


def test_the_report_of_a_trial_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(command, "_work", lambda *arguments: written.append(arguments[3]))
    for steps in (0, 4):
        command.main("all", out=tmp_path, report=None, known=tmp_path, cell=None, steps=steps, threads=0, plan=False)
    command.main("all", out=tmp_path, report=Path("x"), known=tmp_path, cell=None, steps=4, threads=0, plan=False)
    assert written == [command.RESULTS, tmp_path / "report", Path("x")]


@pytest.mark.parametrize("wrong", [{"part": "everything"}, {"cell": ["no such run"]}])
def test_what_the_command_does_not_know_ends_in_a_sentence(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as error:
        command.main(**{"part": "all", "out": tmp_path, "plan": True, "cell": None, **wrong})
    assert error.value.exit_code == 2 and not list(tmp_path.iterdir())
