"""How a run is set up: who is opened and how, what rewards are calibrated on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rewards.weighted import Calibration
from student.bundle import ImageSize, Latents
from student.families.find import family_of
from student.families.two_experts import joined
from tests.student.families import tiny
from tests.training.rats.own_reward import Brightness, Redness
from tests.training.rats.test_families import settings
from training.config import ConfigError, changed, with_settings
from training.evaluate import Evaluation
from training.experiment import setup as module
from training.experiment.presets import preset
from training.experiment.setup import Setup, _check_experts, _prompts, learning, prepare
from training.prompts import Prompts
from training.rats.config import RatsConfig
from training.sampler import Sampler


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def setup_of(config: RatsConfig, latents: Latents, **model: Any) -> Setup:
    absent: Any = None
    roles: Any = SimpleNamespace(model=SimpleNamespace(sigmas=lambda nfe, shape: (nfe, tuple(shape)), **model))
    return Setup(config, roles, latents, absent, absent, {}, absent, 0.0, "")


def test_a_sampler_is_guided_where_it_is_the_teachers_and_nowhere_else() -> None:
    config = changed(
        RatsConfig(),
        {"teacher.guidance": 2.5, "teacher.negative_prompt": "blurred", "compute.precision": "fp32"},
    )
    setup, other = setup_of(config, Latents(8, 6, 4, 2, 1.0, 0.0)), SimpleNamespace(name="another")
    for label, guidance in (("teacher", 2.5), ("student", 1.0)):
        sampler = setup.sampler(other, label, 3)  # type: ignore[arg-type]
        assert sampler == Sampler(other, (3, (4, 8, 6)), guidance, "blurred", "fp32"), "by the teacher's own schedule"  # type: ignore[arg-type]


@pytest.mark.parametrize(("frames", "expected"), [(None, ImageSize(480, 832)), (9, ImageSize(480, 832, 33, 16))])
def test_only_a_video_has_frames_and_their_rate(frames: int | None, expected: ImageSize) -> None:
    config = changed(RatsConfig(), {"image.height_px": 480, "image.width_px": 832, "image.frames": 33})
    assert setup_of(config, Latents(60, 104, 16, 1, 1.0, 0.0, frames), fps=16).image == expected


def test_a_plan_has_the_batch_and_the_latents_of_its_run() -> None:
    setup = setup_of(changed(RatsConfig(), {"validation.batch": 5}), Latents(8, 6, 4, 2, 1.0, 0.0))
    plan = setup.plan(["a", "b"], ["a"])
    assert (plan.prompts, plan.varied, plan.shape, plan.batch) == (["a", "b"], ["a"], (4, 8, 6), 5)


@pytest.mark.parametrize(("steps", "most"), [(49, 64), (50, 1000)])
def test_a_short_run_is_evaluated_on_fewer_prompts(steps: int, most: int, tmp_path: Path) -> None:
    """A trial of fewer than 50 steps; calibration is as it is asked for."""
    (tmp_path / "p.txt").write_text("".join(f"prompt {k}\n" for k in range(2000)))
    asked = {"data.calibration": 100, "data.validation": 130, "data.test": 200}
    config = changed(RatsConfig(), {"steps": steps, "data.prompts": str(tmp_path / "p.txt"), **asked})
    found = _prompts(config)
    assert (len(found.calibration), len(found.validation), len(found.test)) == (100, min(130, most), min(200, most))
    starter = _prompts(changed(RatsConfig(), {"steps": steps, "data.test": 70, "seed": 7}))
    assert len(starter.test) == min(70, most) and starter.judge is not None and not starter.of_file
    assert starter.train(2, 5) != _prompts(changed(RatsConfig(), {"steps": steps, "seed": 8})).train(2, 5)


def test_the_students_steps_say_which_expert_learns_and_a_second_guidance_is_that_experts() -> None:
    model, shape = joined(family_of(tiny.wan_14b(), max_tokens=tiny.MAX_TOKENS)), (4, 1, 4, 4)
    plain: Any = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    second = changed(RatsConfig(), {"teacher.guidance": 4.0, "teacher.guidance_2": 3.0})
    _check_experts(second, model)
    assert model.guidance_2 == 3.0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="teacher.guidance_2 is 3.0: models/shapes-teacher has one transformer"):
        _check_experts(second, plain)
    for method in ("tune", "consistency"):
        with pytest.raises(ConfigError, match="has two experts, so accepted is only method=rats"):
            _check_experts(changed(RatsConfig(), {"compute.shard": True, "method": method}), model)
    _check_experts(changed(RatsConfig(), {"compute.shard": True}), model)
    _check_experts(changed(RatsConfig(), {"compute.shard": True, "method": "tune"}), plain)
    assert learning(changed(RatsConfig(), {"student.nfe": (1,)}), model, shape) == ("transformer",)
    assert learning(changed(RatsConfig(), {"student.nfe": (1, 4)}), model, shape) == ("transformer", "transformer_2")
    assert learning(RatsConfig(), plain, (4, 4, 4)) == ("transformer",)


def test_rewards_are_calibrated_on_the_guided_teacher_at_its_full_step_count(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("".join(f"a red heart number {k}\n" for k in range(80)))
    more = {"prompts": tmp_path / "many.txt", "reference_nfe": 4, "guidance": 3.0, "precision": "fp32"}
    values = settings(tmp_path, "sd3", **more)
    setup = prepare(with_settings(preset("shapes"), values[1::2]))
    texts, model = setup.prompts.calibration, setup.model
    assert len(texts) == 5
    sampler = Sampler(model, model.sigmas(4, setup.latents.shape), 3.0)
    images = sampler.draw(texts, range(len(texts)), setup.latents.shape, 64)
    for role, own in (("trained", Redness()), ("heldout", Brightness())):
        expected = Calibration.of("x", own.score(images, texts).double().tolist())
        found = setup.rewards[role].terms[0].calibration
        assert found is not None and found.mean == pytest.approx(expected.mean, abs=1e-4)
        assert found.std == pytest.approx(expected.std, rel=1e-2)
    raw = Redness().score(images, texts)
    above = (raw - raw.mean()) / raw.std()
    assert setup.reward_p999 == pytest.approx(float(np.percentile(above.numpy(), 99.9)), abs=2e-2)
    assert setup.reward.terms[0].calibration == setup.rewards["trained"].terms[0].calibration
    assert setup.latents.shape == model.latent_shape(32, 32)


def test_what_a_teachers_figures_depend_on_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, and all that makes its pictures others."""
    keys: list[str] = []
    scores = {"trained": [0.0, 1.0], "heldout": [0.0, 1.0]}
    measured = Evaluation("calibration", 6, 1.0, scores, {}, [])
    monkeypatch.setattr(module, "cached", lambda folder, key, make: (keys.append(key), measured)[1])
    (tmp_path / "other.txt").write_text("".join(f"a blue star number {k}\n" for k in range(16)))
    teachers, tf32 = {}, torch.backends.cuda.matmul.allow_tf32
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "steps": {"reference_nfe": 3},
        "guidance": {"guidance": 3.0},
        "negative prompt": {"negative_prompt": "blue"},
        "tiles": {"compute.tile_px": 64},
        "precision": {"precision": "bf16"},
        "teacher in bf16": {"teacher.weights": "bf16", "precision": "bf16"},
        "rewards in bf16": {"reward.weights": "bf16"},
        "reward": {"reward": "tests.training.rats.own_reward:Counted", "reward_weight": 0},
        "prompts": {"prompts": tmp_path / "other.txt"},
    }
    try:
        for name, more in changes.items():
            setup = prepare(with_settings(preset("shapes"), settings(tmp_path, "sd3", **more)[1::2]))
            teachers[name] = setup.teacher
            assert torch.backends.cuda.matmul.allow_tf32 is (setup.config.compute.precision == "bf16"), name
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert len(set(keys)) == len(changes), dict(zip(changes, keys, strict=True))
    apart = {"plain", "tiles", "teacher in bf16"}
    assert len({teachers[name] for name in apart}) == 3 and set(teachers.values()) == {teachers[n] for n in apart}


@pytest.mark.parametrize(
    ("method", "asked", "embeds", "expected"),
    [
        ("rats", 2.0, True, 2.0), ("rats", 1.0, True, 1.0), ("rats", 2.0, False, None),
        ("tune", 1.0, True, 3.5), ("tune", 2.0, True, 2.0), ("tune", 1.0, False, None),
    ],
)  # fmt: skip
def test_flux_that_is_tuned_keeps_its_own_guidance(
    method: str, asked: float, embeds: bool, expected: float | None
) -> None:
    model = family_of(tiny.flux(guidance_embeds=embeds), max_tokens=tiny.MAX_TOKENS)
    module._set_guidance(changed(RatsConfig(), {"method": method, "teacher.guidance": asked}), model)
    assert model.guidance == expected  # type: ignore[attr-defined]


def test_a_step_of_one_sample_has_no_deviation_to_count_in() -> None:
    config = changed(RatsConfig(), {"gate.tau_in_std": True, "optim.batch": 1, "model": "/nowhere"})
    with pytest.raises(ConfigError, match="gate.tau_in_std is true: it needs 2 or more samples per step"):
        prepare(config)
    with pytest.raises(Exception, match="/nowhere"):
        prepare(changed(config, {"optim.accumulate": 2}))


def test_prompts_of_a_run_are_those_of_all_its_steps_and_measurements() -> None:
    drawn: list[tuple[int, int]] = []

    def train(step: int, num: int) -> list[str]:
        drawn.append((step, num))
        return [f"{step}"]

    prompts = Prompts(train, ["c"], ["v"], ["t", "c"], of_file=True)
    config = changed(RatsConfig(), {"steps": 3, "optim.batch": 4, "optim.accumulate": 2})
    assert module.prompts_of_run(config, prompts) == ["", "c", "v", "t", "0", "1", "2"]
    assert drawn == [(step, 8) for step in range(3)]


def test_parts_are_placed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    monkeypatch.setattr(module, "_device", lambda config: "meta")

    def where() -> dict[str, str]:
        return {name: next(part.parameters()).device.type for name, part in model.named_children()}

    module.place(RatsConfig(), model, model.encoders)
    assert where() == {"text_encoder": "meta", "text_encoder_2": "meta", "transformer": "cpu", "vae": "cpu"}
    module.place(changed(RatsConfig(), {"compute.shard": True}), model)
    assert set(where().values()) == {"meta"}, "one process shards nothing"


class Stopped(Exception):
    """A run is prepared up to here."""


def test_rewards_are_opened_where_and_in_what_type_the_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def opened(*given: Any) -> Any:
        asked.append(given)
        raise Stopped

    monkeypatch.setattr(module, "open_rewards", opened)
    monkeypatch.setattr(module, "_device", lambda config: "its device")
    for more, learns in (({}, True), ({"reward_weight": 0.0}, False)):
        named = {"reward": "one", "heldout": "two", "reward.reported": "three", "reward.weights": "bf16", **more}
        with pytest.raises(Stopped):
            prepare(with_settings(preset("shapes"), settings(tmp_path, "sd3", **named)[1::2]))
        trained, heldout, model, *rest = asked.pop()
        assert (trained, heldout, model.name) == ("one", "two", "sd3")
        assert rest == [learns, "its device", torch.bfloat16, "three"]


def test_another_beginning_of_the_student_is_calibrated_on_the_teacher_and_moved_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    moved: list[str] = []
    tiny.sd3(seed=1).save_pretrained(tmp_path / "beginning")
    own = module.student_start

    def begun(config: RatsConfig, teacher: Any) -> Any:
        found = own(config, teacher)
        if found is not None:
            to = found.to
            found.to = lambda device: (moved.append(device), to(device))[1]
        return found

    monkeypatch.setattr(module, "student_start", begun)
    for name, init in (("plain", ""), ("begun", str(tmp_path / "beginning"))):
        monkeypatch.setattr("training.evaluate.CACHE", tmp_path / name)
        setup = prepare(with_settings(preset("shapes"), settings(tmp_path, "sd3", **{"student.init": init})[1::2]))
        kept.append([term.calibration for role in setup.rewards.values() for term in role.terms])
    assert kept[0] == kept[1] and moved == ["cpu"]
    with setup.roles.role("start") as start, setup.roles.role("student") as student:
        assert start is student


def test_samples_of_all_processes_count_where_a_step_needs_two(monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(RatsConfig(), {"gate.tau_in_std": True, "optim.batch": 1, "model": "/nowhere"})
    monkeypatch.setattr(module, "state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(Exception, match="/nowhere"):
        prepare(config)


def test_every_process_encodes_the_prompts_that_any_of_them_will_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Processes", lambda: SimpleNamespace(size=3))
    drawn: list[int] = []
    prompts = Prompts(lambda step, num: [drawn.append(num) or f"{step}.{k}" for k in range(num)], [], [], [], True)  # type: ignore[func-returns-value]
    config = changed(RatsConfig(), {"steps": 2, "optim.batch": 2, "optim.accumulate": 2})
    found = module.prompts_of_run(config, prompts)
    assert found == ["", *(f"{step}.{k}" for step in range(2) for k in range(12))] and set(drawn) == {12}


def test_each_process_has_a_gpu_of_its_own_and_a_named_device_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert module._device(RatsConfig()) == "cpu"
    monkeypatch.setattr(module, "state", lambda: SimpleNamespace(device=torch.device("cuda:1")))
    assert module._device(RatsConfig()) == "cpu", "there is none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module._device(RatsConfig()) == "cuda:1"
    assert module._device(changed(RatsConfig(), {"compute.device": "cpu"})) == "cpu"


def test_a_base_is_quantised_with_what_the_student_begins_as_and_its_figures_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both networks lie on the device beside each other; and narrow weights draw other pictures."""
    narrowed: list[tuple[int, str]] = []
    monkeypatch.setattr(module, "quantise", lambda network, form: narrowed.append((id(network), form)))
    monkeypatch.setattr(module, "require", lambda *given: None)
    tiny.sd3(seed=1).save_pretrained(tmp_path / "beginning")
    teachers = []
    for form in ("", "nf4", "fp8"):
        narrowed.clear()
        more = {"lora_rank": 2, "weights": "bf16", "precision": "bf16", "student.init": tmp_path / "beginning"}
        chosen = settings(tmp_path, "sd3", **more, **{"compute.quantise": form})[1::2]
        setup = prepare(with_settings(preset("shapes"), chosen))
        teachers.append(setup.teacher)
        with setup.roles.role("start") as model:
            start = id(model.transformer)
        assert narrowed == [(start, form), (id(setup.model.transformer), form)] and start != narrowed[1][0]
    assert len(set(teachers)) == 3


def test_a_reward_that_sees_some_frames_of_a_video_is_calibrated_on_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    columns: list[set[str]] = []
    scores = dict.fromkeys(("trained", "heldout", "trained 0-1", "trained 1-5"), [0.0, 1.0])

    def kept(folder: Path, key: str, make: Any) -> Evaluation:
        keys.append(key)
        return Evaluation("calibration", 6, 1.0, scores, {}, [])

    monkeypatch.setattr(module, "cached", kept)
    with_windows = module.with_windows
    monkeypatch.setattr(
        module,
        "with_windows",
        lambda *given: (found := with_windows(*given), columns.append(set(found.scorers)))[0],
    )
    for frames in (0, 1):
        prepare(with_settings(preset("shapes"), settings(tmp_path, "wan", **{"reward.frames": frames})[1::2]))
    assert columns == [{"trained", "heldout"}, {"trained", "heldout", "trained 0-1", "trained 1-5"}]
    assert len(set(keys)) == 2, "figures that lack the windows would be taken for those that have them"
