"""Settings from the command line: applied, or refused in one sentence."""

from pathlib import Path

import pytest

from training.config import ConfigError, to_json, with_settings
from training.rats.preset import RatsConfig, preset
from training.rundir import RunDirError, claim
from training.shapes.preset import ShapesPretraining


def test_settings_keep_their_type() -> None:
    config = with_settings(RatsConfig(), ["steps=5", "tau=2", "model=out/x"])
    assert (config.steps, config.tau, config.model) == (5, 2.0, "out/x")
    assert isinstance(config.tau, float)


def test_a_dot_reaches_into_a_group() -> None:
    assert with_settings(ShapesPretraining(), ["teacher.steps=7"]).teacher.steps == 7


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stpes=5", "did you mean 'steps'"),
        ("steps", "accepted is key=value"),
        ("steps=many", "accepted is a int"),
        ("steps=2.5", "accepted is a int"),
        ("steps.x=1", "has no parts"),
    ],
)
def test_what_cannot_be_set_is_said(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_settings(RatsConfig(), [setting])


def test_a_group_is_not_a_value() -> None:
    with pytest.raises(ConfigError, match="teacher.steps"):
        with_settings(ShapesPretraining(), ["teacher=5"])


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="known are shapes"):
        preset("nope")


@pytest.mark.parametrize("setting", ["tau=0", "steps=0", "ema=1.5", "nfe=0", "nfe=[4,4]", "gate=open", "lr=-1"])
def test_impossible_values_are_refused_before_anything_is_loaded(setting: str) -> None:
    with pytest.raises(ConfigError, match="accepted (is|are)"):
        with_settings(RatsConfig(), [setting]).check()


def test_a_run_directory_is_new_or_its_own(tmp_path: Path) -> None:
    ours, other = to_json(RatsConfig()), to_json(RatsConfig(steps=7))
    claim(tmp_path / "out" / "run", ours, tmp_path / "out")
    claim(tmp_path / "out" / "run", ours, tmp_path / "out")
    with pytest.raises(RunDirError, match=r"another configuration \(steps\)"):
        claim(tmp_path / "out" / "run", other, tmp_path / "out")


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirError, match="already holds"):
        claim(tmp_path / "run", to_json(RatsConfig()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
