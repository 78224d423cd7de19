"""Settings from the command line: applied, or refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.config import ConfigError, changed, leaves, to_json, with_settings
from training.experiment.presets import preset
from training.lab.teachers import TeachersConfig
from training.rats.config import RatsConfig
from training.rundir import FINISHED, RunDirError, claim
from training.shapes.preset import ShapesPretraining


def test_settings_keep_their_type() -> None:
    config = with_settings(RatsConfig(), ["steps=5", "gate.tau=2", "model=out/x", "student.nfe=[2,4]"])
    assert (config.steps, config.gate.tau, config.model, config.student.nfe) == (5, 2.0, "out/x", (2, 4))
    assert isinstance(config.gate.tau, float)


def test_a_dot_reaches_into_a_group() -> None:
    assert with_settings(ShapesPretraining(), ["teacher.steps=7"]).teacher.steps == 7


def test_settings_are_checked_together_and_not_one_by_one() -> None:
    config = with_settings(RatsConfig(), ["compute.weights=bf16", "lora.rank=4"])
    assert config.compute.weights == "bf16" and config.lora.rank == 4
    with pytest.raises(ConfigError, match=r"compute.weights is 'bf16' with lora.rank 0"):
        with_settings(config, ["lora.rank=0"])


def test_every_setting_that_moved_names_where_it_is_now() -> None:
    known = dict(leaves(RatsConfig()))
    assert set(RatsConfig.MOVED.values()) <= known.keys()
    for old, new in RatsConfig.MOVED.items():
        with pytest.raises(ConfigError, match=f"setting '{old}' is now called '{new}'"):
            with_settings(RatsConfig(), [f"{old}=1"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stpes=5", "did you mean 'steps'"),
        ("optim.rl=5", "did you mean 'optim.lr'"),
        ("qqq=5", "accepted are compute.checkpointing"),
        ("steps", "accepted is key=value"),
        ("steps=many", "accepted is an integer, for example"),
        ("steps=2.5", "accepted is an integer, for example"),
        ("steps.x=1", "is a single setting, not a group"),
    ],
)
def test_what_cannot_be_set_is_said(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_settings(RatsConfig(), [setting])


def test_a_group_is_not_a_value() -> None:
    with pytest.raises(ConfigError, match="teacher.steps"):
        with_settings(ShapesPretraining(), ["teacher=5"])


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="accepted are shapes"):
        preset("nope")


@pytest.mark.parametrize(
    "setting",
    [
        *("gate.tau=0", "steps=0", "teacher.ema=1.5", "student.nfe=0", "student.nfe=[4,4]", "gate.kind=open"),
        *("optim.lr=-1", "seed=-1", "shaping.horizons=1.0", "reward.hinge=NaN", "optim.lr=Infinity"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_loaded(setting: str) -> None:
    with pytest.raises(ConfigError, match="accepted (is|are)"):
        with_settings(RatsConfig(), [setting])


@pytest.mark.parametrize("name", ["my model", "", "-x", "x" * 65, "a/b", "größe"])
def test_a_name_that_the_bundle_would_refuse_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    for key in ("student.id", "student.version"):
        with pytest.raises(ConfigError, match=f"{key} is {name!r}: accepted are"):
            with_settings(RatsConfig(), [f"{key}={name}"])
    with_settings(RatsConfig(), ["student.id=Flux-dev_3.1", "student.version=2.0-rc1"])


def test_until_it_is_finished_a_run_may_be_gone_on_with_under_another_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run, RatsConfig())
    claim(run, changed(RatsConfig(), {"student.id": "other", "student.version": "2"}))
    kept = json.loads((run / "config.json").read_text())
    assert (kept["student"]["id"], kept["student"]["version"]) == ("other", "2")
    with pytest.raises(RunDirError, match=r"another configuration \(steps\)"):
        claim(run, changed(RatsConfig(), {"student.id": "third", "steps": 7}))
    (run / FINISHED).touch()
    with pytest.raises(RunDirError, match=r"another configuration \(student.id, student.version\)"):
        claim(run, RatsConfig())


def test_a_run_directory_is_new_or_its_own(tmp_path: Path) -> None:
    ours, other = RatsConfig(), changed(RatsConfig(), {"steps": 7})
    claim(tmp_path / "out" / "run", ours, tmp_path / "out")
    claim(tmp_path / "out" / "run", ours, tmp_path / "out")
    with pytest.raises(RunDirError, match=r"another configuration \(steps\)"):
        claim(tmp_path / "out" / "run", other, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "key", "another"),
    [
        (RatsConfig(), "shaping.steer", 0.5),
        (RatsConfig(), "reward.hinge", 2.0),  # whose default is infinite
        (RatsConfig(), "tracker", "wandb"),
        (ShapesPretraining(), "teacher.swapped", 0.5),
        (ShapesPretraining(), "students.models", ("a",)),
        (TeachersConfig(), "guidance", 2.0),
    ],
)
def test_a_setting_that_an_earlier_release_did_not_have_counts_as_its_default(
    config: Any, key: str, another: Any, tmp_path: Path
) -> None:
    """Its run goes on; with any other value than the default it would be another run."""
    kept = json.loads(to_json(config))
    *groups, name = key.split(".")
    inner = kept
    for group in groups:
        inner = inner[group]
    inner.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(kept))
    claim(tmp_path, config)
    assert (tmp_path / "config.json").read_text() == to_json(config) + "\n"
    (tmp_path / "config.json").write_text(json.dumps(kept))
    other = changed(config, {key: another})
    if key == "tracker":
        return claim(tmp_path, other)
    with pytest.raises(RunDirError, match=rf"holds a run with another configuration \({key}\): choose another --out$"):
        claim(tmp_path, other)
    kept["gone"] = 1  # which a later release dropped: nobody knows what it meant
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(RunDirError, match=r"another configuration \(gone\)"):
        claim(tmp_path, config)


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirError, match="already holds"):
        claim(tmp_path / "run", RatsConfig(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
