"""A whole RATS run on a tiny starter world: bundle, card, resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from student.bundle import read_student
from student.files import verify_files
from student.runtimes.load import load
from tests.training.shapes import small
from training import checkpoint
from training.config import ConfigError
from training.evaluate import Measure
from training.shapes.prompts import measuring_prompts
from training.steplog import read_log


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    small.write_models(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path_factory.getbasetemp() / "cache")


def run(*arguments: str) -> tuple[int, str]:
    import typer

    from training.run import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def student(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.evaluate.CACHE", tmp_path_factory.getbasetemp() / "cache")
        code, text = run("--out", str(out), *small.settings(models))
    assert code == 0, text
    return out


def test_the_run_leaves_a_bundle_that_serves(student: Path) -> None:
    manifest = read_student(student)
    verify_files(student, manifest)
    runtime = load(student, "torch", threads=1)
    images = runtime.draw(["a red heart", "a blue star"], [1, 2], 4)
    assert images.shape == (2, 3, 64, 64) and 0 <= images.min() <= images.max() <= 1


def test_the_card_tells_that_the_run_was_short_and_shows_the_pictures(student: Path) -> None:
    card = (student / "README.md").read_text()
    assert "A short run: 4 steps, evaluated on 64 prompts only" in card
    assert "| teacher | 8 |" in card and "| student | 4 |" in card
    for name in ("grid.png", "curves.png"):
        assert name in card and (student / name).stat().st_size > 5_000


def test_every_step_is_logged(student: Path) -> None:
    rows = read_log(student / "run" / "log.jsonl")
    assert rows[0]["step"] == -1 and "heldout_validation" in rows.pop(0)  # the start, before any step
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    wanted = {"reward_student", "reward_teacher", "gap", "gate_mean", "gate_std", "share_ahead", "shaping", "grad_norm"}
    wanted |= {"lr", "teacher_s", "student_s", "decode_s", "reward_s", "backward_s", "update_s"}
    assert all(wanted <= row.keys() for row in rows)
    assert [row["samples"] / rows[0]["samples"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "heldout_validation" in row] == [1, 3]


def test_the_manifest_holds_the_evidence(student: Path) -> None:
    evaluation = read_student(student).evaluation
    assert [(row["model"], row["nfe"], row["prompts"]) for row in evaluation] == [
        ("teacher", 8, 64),
        ("teacher", 4, 64),
        ("student", 4, 64),
    ]
    assert {"trained", "heldout", "judge_right", "judge_right_but_shape", "diversity"} <= evaluation[0].keys()


def test_exports_of_it_are_proven_with_prompts_of_its_own_world(student: Path) -> None:
    assert (student / "calibration.txt").read_text().splitlines() == measuring_prompts()[0][:32]


def test_a_finished_run_is_not_done_again(student: Path, models: Path) -> None:
    before = (student / "student.json").stat().st_mtime_ns
    code, text = run("--out", str(student), *small.settings(models))
    assert code == 0 and "already holds the finished student" in text.replace("\n", " ")
    assert (student / "student.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused(student: Path, models: Path) -> None:
    code, text = run("--out", str(student), *small.settings(models, steps=9, lr=0.5))
    assert code == 2 and "another configuration" in " ".join(text.split()) and "Traceback" not in text
    code, text = run("--out", str(student), *small.settings(models, steps=9))
    assert code == 2 and "to continue from it, use --init" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "nope"], "accepted are shapes"),
        (["--set", "stpes=5"], "did you mean 'steps'"),
        (["--set", "lr=5"], "setting 'lr' is now called 'optim.lr'"),
        (["--set", "optim.lr=Infinity"], "optim.lr is inf: accepted is a finite number"),
        (["--set", "reward.hinge=NaN"], "reward.hinge is nan: accepted is a finite number"),
        (["--set", "model=/nowhere/at/all"], "is not a folder"),
    ],
)
def test_a_typo_is_one_sentence_and_leaves_nothing(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    code, text = run("--out", str(tmp_path / "new"), *arguments)
    assert code == 2
    assert sentence in text.replace("\n", " ")
    assert len(text.strip().splitlines()) <= 5 and "Traceback" not in text  # one sentence, wrapped
    assert not (tmp_path / "new").exists()


def test_dry_run_prints_the_whole_configuration(tmp_path: Path) -> None:
    code, text = run("--out", str(tmp_path / "new"), "--model", "some/model", "--set", "shaping.alpha=2.5", "--dry-run")
    assert code == 0 and (json.loads(text)["shaping"]["alpha"], json.loads(text)["model"]) == (2.5, "some/model")
    assert not (tmp_path / "new").exists()


def test_sigterm_leaves_a_checkpoint_at_once_and_the_same_command_goes_on(models: Path, tmp_path: Path) -> None:
    """Long before the next validation, which alone made checkpoints before."""
    arguments = small.settings(models, steps=200, validate_every=200, test_prompts=4, validation_prompts=4)
    command = [sys.executable, "-m", "training.run", "--threads", "1", *arguments, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "out" / "run" / "log.jsonl", time.monotonic() + 120
    while len(read_log(log)) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "the same command resumes from there" in " ".join(
        text.split()
    )
    saved = checkpoint.load(tmp_path / "out" / "run" / "checkpoint.pt")
    assert saved is not None and 3 <= saved["step"] < 200
    done = len(read_log(log))
    assert done == saved["step"] + 1  # and the row of the start
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(read_log(log)) <= done and time.monotonic() < deadline + 60 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [row["step"] for row in read_log(log)][: done + 1] == list(range(-1, done))


def test_kill_9_and_the_same_command_give_the_same_student(models: Path, tmp_path: Path) -> None:
    """A real process, really killed after its first checkpoint; weights and log as if it had not been."""
    arguments = small.settings(models, steps=6)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "training.run", "--threads", "1", *arguments, "--out"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([*command, str(whole)], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(cut)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (cut / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "student.json").exists(), "the run had ended before it was killed"
    subprocess.run([*command, str(cut)], env=environment, check=True, capture_output=True)
    a, b = (load_file(p / "transformer" / "diffusion_pytorch_model.safetensors") for p in (whole, cut))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    rows = [
        [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_log(p / "run" / "log.jsonl")]
        for p in (whole, cut)
    ]
    assert rows[0] == rows[1]


FEW: dict[str, object] = {
    "data.calibration": 8, "data.validation": 4, "data.validation_diversity": 1, "data.test": 4,
    "data.test_diversity": 1, "batch": 2, "reference_nfe": 4,
}  # fmt: skip


def test_sigterm_while_it_prepares_and_while_it_evaluates_ends_it_at_once_and_the_same_command_goes_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    arguments = ["--out", str(tmp_path / "out"), *small.settings(models, **FEW)]
    plain, asked = Measure.evaluate, []

    def evaluate(self: Measure, label: str, *rest: object) -> object:
        if label not in asked:
            asked.append(label)
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, label, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Measure, "evaluate", evaluate)
    for label in ("calibration", "teacher", "student"):
        code, text = run(*arguments)
        assert code == 128 + signal.SIGTERM and "stopped: the same command goes on" in " ".join(text.split()), text
        assert asked[-1] == label and not (tmp_path / "out" / "student.json").exists()
    rows = read_log(tmp_path / "out" / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == [-1, 0, 1, 2, 3]
    code, text = run(*arguments)
    assert code == 0 and read_student(tmp_path / "out").steps == (4,), text
    again = read_log(tmp_path / "out" / "run" / "log.jsonl")
    assert again == rows, "no step was made twice"


def test_a_run_computes_with_as_many_threads_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def prepare(config: object) -> None:
        done.append("prepared")
        raise ConfigError("that is enough")

    monkeypatch.setattr("training.experiment.setup.prepare", prepare)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    for asked, expected in (("3", [3, "prepared"]), ("0", ["prepared"])):
        done.clear()
        code, text = run("--out", str(tmp_path / "out"), "--threads", asked)
        assert code == 2 and "that is enough" in text and done == expected


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("finished", [True, False])
def test_the_first_process_alone_pushes_a_student_once_it_is_there(
    first: bool, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    out = tmp_path / "out"
    monkeypatch.setattr("training.run.Processes", lambda: SimpleNamespace(is_first=first, size=2, wait=lambda: None))
    monkeypatch.setattr("training.run.refuse_others", lambda *given: done.append("refused others"))
    monkeypatch.setattr("training.run.claim_together", lambda *given: done.append("claimed"))
    monkeypatch.setattr("training.run.push", lambda *given: (done.append(given), "it is there")[1])
    monkeypatch.setattr("training.experiment.setup.prepare", lambda config: done.append("prepared"))
    monkeypatch.setattr("training.experiment.run.run", lambda *given: done.append("run"))
    if finished:
        (out / "run").mkdir(parents=True)
        (out / "run" / "finished").write_text("")
    code, text = run("--out", str(out), "--push-to", "me/student")
    assert code == 0, text
    assert done == [
        *(["refused others"] if first else []),
        *([] if finished else ["prepared", "claimed", "run"]),
        *([(out, "me/student")] if first else []),
    ]
    done.clear()
    run("--out", str(out))
    assert (out, None) not in done and len(done) == first + (0 if finished else 3)
