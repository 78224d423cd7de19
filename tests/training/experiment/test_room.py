"""Too little memory for a preset is said in one sentence, from the figures that were counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from training.config import changed
from training.experiment import room
from training.experiment.presets import PRESETS, preset
from training.experiment.ways import fitting_ways
from training.rats.config import RatsConfig
from training.run import main

COUNTED = [
    {
        "name": "plain",
        "preset": "flux-dev",
        "settings": {},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 26.0, "learnt": 2.0},
        "peak": {"teacher": 29.0, "student": 29.7, "backward": 32.0, "update": 28.6, "validation": 31.0},
    },
    {
        "name": "narrow",
        "preset": "flux-dev",
        "settings": {"compute.quantise": "nf4"},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 9.0, "learnt": 2.0},
        "peak": {"teacher": 12.0, "student": 12.7, "backward": 15.0, "update": 11.6, "validation": 21.0},
    },
    {
        "name": "narrow, in tiles",
        "preset": "flux-dev",
        "settings": {"compute.quantise": "nf4", "compute.tile_px": 256},
        "processes": 1,
        "limit_gb": None,
        "held": {"weights": 9.0, "learnt": 2.0},
        "peak": {"teacher": 11.0, "student": 11.5, "backward": 13.0, "update": 11.6, "validation": 12.0},
    },
    {
        "name": "sharded, offloaded",
        "preset": "flux-dev",
        "settings": {"optim.state": "offload"},
        "processes": 8,
        "limit_gb": None,
        "held": {"weights": 3.0, "learnt": 0.5},
        "peak": {"teacher": 5.0, "student": 5.5, "backward": 7.0, "update": 5.6, "validation": 5.0},
    },
]


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory_gb.json").write_text(json.dumps(COUNTED))
    monkeypatch.setattr(room, "FIGURES", tmp_path / "memory_gb.json")


def test_what_fits_is_let_through() -> None:
    assert room.too_large("flux-dev", preset("flux-dev"), 33.5) == ""
    assert room.too_large("sd35-medium", preset("sd35-medium"), 1.0) == "", "of what was not counted nothing is said"


def test_what_does_not_fit_names_what_would_the_cheapest_first() -> None:
    sentence = room.too_large("flux-dev", preset("flux-dev"), 24.0)
    assert sentence.startswith("preset flux-dev needs 32 GB, but the GPU has only 24: it would fit with ")
    # 26 to 9 GB of weights save nf4's 74 %, so 8 bits 11.5 of 23; 28 / 2 + 4 = 18 on two GPUs
    ways = re.findall(r"(?:with|or) (\S+)[^;]*? \((\d+) GB\)", sentence)
    assert ways == [("compute.quantise=fp8", "21"), ("compute.quantise=nf4", "21"), ("compute.shard=true", "18")]
    assert "optim.state" not in sentence, "that was counted on 8 GPUs"
    assert "validation.batch=1" not in sentence, "32 GB are the backward pass's, which it does not change"
    narrow = changed(preset("flux-dev"), {"compute.quantise": "nf4"})
    sentence = room.too_large("flux-dev", narrow, 20.0)
    assert (
        sentence.startswith("preset flux-dev needs 21 GB") and "validation.batch=1 and teacher.batch=1 (15" in sentence
    )
    assert "or compute.tile_px=256 (13 GB)" in sentence.replace("; or", " or")
    # half of each side leaves a quarter of validation's 10 GB
    assert "or image.height_px=256 and image.width_px=256 (14 GB)" in sentence and "shard" not in sentence
    assert "compute.tile_px" not in room.too_large("flux-dev", preset("flux-dev"), 24.0), (
        "of this alone nothing is known"
    )
    assert room.too_large("flux-dev", narrow, 24.0) == ""
    assert "but the GPU has only 2: no two settings make it fit (computed" in room.too_large("flux-dev", narrow, 2.0)


def test_what_a_run_has_already_is_not_advised() -> None:
    ones = changed(preset("flux-dev"), {"compute.quantise": "nf4", "validation.batch": 1, "teacher.batch": 1})
    rows = json.loads(room.FIGURES.read_text())
    for row in rows:
        row["settings"] |= {"validation.batch": 1, "teacher.batch": 1}
    room.FIGURES.write_text(json.dumps(rows))
    sentence = room.too_large("flux-dev", ones, 20.0)
    assert sentence.startswith("preset flux-dev needs 21 GB") and "batch=1" not in sentence
    half = changed(ones, {"validation.batch": 2})
    assert room.too_large("flux-dev", half, 20.0) == "", "that was not counted"


def test_what_changes_no_memory_is_counted_all_the_same_and_what_does_is_not_judged() -> None:
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"optim.lr": 1e-3, "steps": 7}), 24.0)
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"lora.rank": 64}), 24.0) == ""
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"image.height_px": 1024}), 24.0) == ""
    assert room.too_large("flux-dev", changed(preset("flux-dev"), {"validation.batch": 1}), 24.0) == ""
    whole = {"lora.rank": 0, "compute.weights": "fp32"}
    rows = json.loads(room.FIGURES.read_text())
    room.FIGURES.write_text(json.dumps([{**rows[0], "settings": whole}]))
    config = changed(preset("flux-dev"), whole)
    assert room.too_large("flux-dev", config, 2.0) != ""
    assert room.too_large("flux-dev", changed(config, {"teacher.weights": "bf16"}), 2.0) == "", "that was not counted"


def test_a_way_must_leave_something_to_spare_and_gpus_that_share_nothing_are_each_one() -> None:
    plain = preset("flux-dev")
    sentence = room.too_large("flux-dev", plain, 22.0)
    assert not re.search(r"(with|; or) compute.quantise", sentence), "21 GB, and 1.5 to spare"
    assert room.too_large("flux-dev", plain, 24.0, 8) == room.too_large("flux-dev", plain, 24.0) != ""


def test_where_no_setting_is_enough_two_are_named_that_may_be_set_together() -> None:
    plain = preset("flux-dev")
    sentence = room.too_large("flux-dev", plain, 9.0)
    # 28 / 8 + 4 on eight GPUs, which is enough; 28 / 4 and a sixteenth of 4 on four
    ways = sentence.partition("it would fit with ")[2].partition(" (computed")[0].split("; or ")
    assert ways[0] == "compute.shard=true and compute.shard_frugal=true on 8 GPUs, each (8 GB)"
    assert ways[1].endswith(" on 4 GPUs, each and image.height_px=128 and image.width_px=128 (7 GB)")
    assert len(ways) == 2, "a base in 4 bits is not sharded"
    sentence = room.too_large("flux-dev", plain, 22.0)
    assert sentence.count("optim.state=8bit and compute.quantise=") == 2, "18 GB on two GPUs, and then 31.25 - 11.5"
    assert "no two settings" in room.too_large("flux-dev", plain, 5.0)


def test_a_student_that_begins_as_another_model_takes_a_second_network() -> None:
    another = changed(preset("flux-dev"), {"student.init": "someone/some-model"})
    assert room.too_large("flux-dev", another, 24.0) == "", "that was not counted"
    rows = json.loads(room.FIGURES.read_text())
    second = {**rows[0], "name": "second", "settings": {"student.init": "another"}}
    second["peak"] = {part: gb + 24 for part, gb in second["peak"].items()}
    second["held"] = {"weights": 50.0, "learnt": 2.0}
    room.FIGURES.write_text(json.dumps([*rows, second]))
    assert room.too_large("flux-dev", another, 40.0).startswith("preset flux-dev needs 56 GB")
    assert room.too_large("flux-dev", preset("flux-dev"), 40.0) == ""


def test_a_gradient_through_all_steps_is_advised_the_detached_one() -> None:
    rows = json.loads(room.FIGURES.read_text())
    full = {**rows[0], "name": "full", "settings": {"gradient.mode": "full"}}
    full["peak"] = {**full["peak"], "student": 50.0, "backward": 52.0}
    room.FIGURES.write_text(json.dumps([*rows, full]))
    sentence = room.too_large("flux-dev", changed(preset("flux-dev"), {"gradient.mode": "full"}), 48.0)
    assert "it would fit with gradient.mode=detached (32 GB)" in sentence


def test_too_little_memory_is_said_before_anything_is_opened_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=24e9)
    cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0, get_device_properties=lambda _: card)
    monkeypatch.setattr(room, "torch", SimpleNamespace(cuda=cuda))
    for place in ("training.experiment.setup.open_family", "training.experiment.setup.open_rewards"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("it was opened"))
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("it was fetched"))
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--preset", "flux-dev", "--out", str(tmp_path / "out")])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "preset flux-dev needs 32 GB, but the GPU has only 24: it would fit with" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name]().lora.rank])
def test_a_teacher_of_pictures_draws_several_samples_of_a_step_at_once(name: str) -> None:
    """One after the other would leave a GPU half idle; of videos one fills it."""
    config = preset(name)
    assert (config.teacher.batch > 1) == (config.image.frames == 1)
    assert (config.optim.batch * config.optim.accumulate) % max(1, config.teacher.batch) == 0


def test_half_of_a_videos_frames_leaves_the_share_of_its_latent_frames() -> None:
    """33 frames are 1 + 32 / 4 = 9 of the latent, and 17 are 5: of the 9 GB that are not held 5 remain."""
    row = {"settings": {}, "processes": 1, "held": {"weights": 1.5, "learnt": 0.5}, "peak": {"student": 11.0}}
    video = changed(RatsConfig(), {"image.height_px": 480, "image.width_px": 832, "image.frames": 33})
    assert dict(fitting_ways(row, [row], video, 8.0))["image.frames=17"] == pytest.approx(1.5 + 0.5 + 5.0)


@pytest.mark.parametrize(
    ("change", "judged"),
    [
        ({"image.width_px": 1024}, False), ({"lora.rank": 64}, False), ({"compute.tile_px": 64}, False),
        ({"compute.checkpointing": False}, False), ({"gradient.mode": "full"}, False),
        ({"optim.batch": 2}, False), ({"reward.weights": "fp32"}, False), ({"reward.frames": 1}, False),
        ({"teacher.batch": 2}, False), ({"validation.batch": 2}, False),
        ({"compute.save_minutes": 3.0}, True), ({"compute.compile": "inductor"}, True), ({"optim.lr": 1e-3}, True),
        ({"optim.warmup": 3}, True), ({"optim.decay": 0.5}, True), ({"compute.device": "cuda"}, True),
        ({"teacher.nfe": 8}, True), ({"reward.weight": 0.5}, True), ({"validation.every": 7}, True),
    ],
)  # fmt: skip
def test_a_row_is_of_all_configurations_that_take_the_same_memory_and_of_no_other(
    change: dict[str, object], judged: bool
) -> None:
    assert bool(room.too_large("flux-dev", changed(preset("flux-dev"), change), 24.0)) == judged


def test_a_sharded_run_is_judged_by_what_was_counted_on_as_many_gpus() -> None:
    rows = json.loads(room.FIGURES.read_text())
    for row in rows[3:]:
        row["settings"]["compute.shard"] = True
    room.FIGURES.write_text(json.dumps(rows))
    sharded = changed(preset("flux-dev"), {"compute.shard": True, "optim.state": "offload"})
    assert room.too_large("flux-dev", sharded, 6.0, 8).startswith("preset flux-dev needs 7 GB")
    assert room.too_large("flux-dev", sharded, 9.0, 8) == ""
    assert room.too_large("flux-dev", sharded, 6.0, 4) == "", "that was not counted"


def test_an_optimizer_of_8_bits_is_not_advised_together_with_sharding() -> None:
    """28 GB, of which 20 are learnt: 8 bits take 7.5 off, and four GPUs 21; both would leave 17."""
    row = {"settings": {}, "processes": 1, "held": {"weights": 8.0, "learnt": 20.0}, "peak": {"student": 40.0}}
    assert "optim.state=8bit" in dict(fitting_ways(row, [row], preset("flux-dev"), 33.0))
    named = [name for name, _ in fitting_ways(row, [row], preset("flux-dev"), 18.5)]
    assert any(name.startswith("compute.shard=true") for name in named)
    assert not any("optim.state=8bit" in name and "compute.shard" in name for name in named)


@pytest.mark.parametrize(("device", "judged"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_only_a_run_on_the_gpu_is_held_against_its_memory(
    device: str, judged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    card = SimpleNamespace(total_memory=24e9)
    cuda = SimpleNamespace(
        is_available=lambda: True, current_device=lambda: 1, get_device_properties=[None, card].__getitem__
    )
    monkeypatch.setattr(room, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(room, "Processes", lambda: SimpleNamespace(size=3))
    monkeypatch.setattr(room, "too_large", lambda *given: asked.append(given) or "")
    config = changed(RatsConfig(), {"compute.device": device})
    room.require_room("shapes", config)
    assert asked == ([("shapes", config, 24.0, 3)] if judged else [])
