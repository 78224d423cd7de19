"""A student that begins as something else than its teacher, a run that is made longer, and tuning without a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from student.bundle import BundleError
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training import beginning as module
from training.beginning import beginning
from training.config import ConfigError, changed, to_json
from training.rats.config import RatsConfig
from training.rats.method import Batch
from training.rats.roles import Lora, Roles
from training.rats.tune import Tune, bounded_target
from training.run import resolved
from training.rundir import RunDirError, refuse_others
from training.steplog import read_log


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def velocity_of(transformer: Any, x: Tensor) -> Tensor:
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    model.transformer = transformer
    with torch.no_grad():
        return model.velocity(x, 0.5, model.encode(["a red heart"]))


X = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def test_an_own_checkpoint_and_a_lora_are_what_the_student_begins_as(tmp_path: Path) -> None:
    teacher, other = tiny.flux(seed=0), tiny.flux(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "other")
    found = beginning(str(tmp_path / "other"), str(tmp_path / "teacher"), teacher.transformer, torch.float32)
    torch.testing.assert_close(velocity_of(found, X), velocity_of(other.transformer, X), atol=1e-5, rtol=1e-5)
    model = family_of(tiny.flux(seed=0), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, 0.5, Lora(2, 4.0))
    with torch.no_grad():
        for p in roles.trainable:
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    expected = velocity_of(model.transformer, X)
    roles.merge(tmp_path / "adapter", type(teacher))
    lora = beginning(str(tmp_path / "adapter"), str(tmp_path / "teacher"), teacher.transformer, torch.float32)
    torch.testing.assert_close(velocity_of(lora, X), expected, atol=1e-4, rtol=1e-4)
    assert (expected - velocity_of(teacher.transformer, X)).abs().max() > 0.01
    file = next((tmp_path / "adapter").glob("*.safetensors"))
    same = beginning(str(file), str(tmp_path / "teacher"), teacher.transformer, torch.float32)
    torch.testing.assert_close(velocity_of(same, X), velocity_of(lora, X), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_another_form_is_refused_and_schnell_beside_dev_is_not(tmp_path: Path) -> None:
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    tiny.flux(guidance_embeds=False).save_pretrained(tmp_path / "schnell")
    dev = tiny.flux(guidance_embeds=True)
    dev.save_pretrained(tmp_path / "dev")
    with pytest.raises(ConfigError, match="whose transformer differs from that of"):
        beginning(str(tmp_path / "sd3"), str(tmp_path / "dev"), dev.transformer, torch.float32)
    model = family_of(dev, max_tokens=tiny.MAX_TOKENS)
    schnell = beginning(str(tmp_path / "schnell"), str(tmp_path / "dev"), dev.transformer, torch.float32)
    roles = Roles(model, 0.5, begin=schnell)
    assert model.baked == {} and model.velocity(X, 0.5, model.encode(["a ring"])).shape == X.shape
    with roles.role("start") as start:
        assert start.baked == {"guidance_scale": 3.5} and start.velocity(X, 0.5, model.encode(["a ring"])) is not None


@pytest.mark.parametrize("lora", [None, Lora(2, 4.0)])
def test_the_average_begins_as_the_student_and_the_start_stays_the_teacher(lora: Lora | None) -> None:
    teacher, other = tiny.flux(seed=0), tiny.flux(seed=1)
    before = {name: velocity_of(pipe.transformer, X) for name, pipe in (("start", teacher), ("student", other))}
    model = family_of(teacher, max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, 0.5, lora, begin=other.transformer)
    for name, expected in (("student", "student"), ("teacher", "student"), ("start", "start"), ("student", "student")):
        with roles.role(name) as found:
            assert torch.equal(velocity_of(found.transformer, X), before[expected]), name
    model.velocity(X, 0.5, model.encode(["a ring"])).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.trainable)


def test_a_run_goes_on_from_a_finished_student_with_a_teacher_of_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("--out", str(first), *settings(tmp_path, "flux", steps=1, lr=0.01))[0] == 0
    more = settings(tmp_path, "flux", steps=1, lr=1e-7)
    code, text = run("--out", str(second), "--init", str(first), *more)
    assert code == 0, text
    folders = (tmp_path / "flux", first, second)
    base, one, two = (load_file(next((folder / "transformer").glob("*.safetensors"))) for folder in folders)
    moved = max(float((one[name].float() - value).abs().max()) for name, value in base.items())
    further = max(float((two[name].float() - one[name].float()).abs().max()) for name in base)
    assert further < 0.2 * moved
    kept = json.loads((second / "run" / "config.json").read_text())
    assert kept["student"]["init"] == str(first)
    assert "It began as `first`, whose terms hold for it too." in (second / "README.md").read_text()


def test_a_run_is_made_longer_until_it_is_finished_and_then_it_is_said_how(tmp_path: Path) -> None:
    def written(steps: int, guided_steps: int = 2, every: int = 4, tracker: str = "wandb") -> RatsConfig:
        inner = {"teacher.guided_steps": guided_steps, "validation.every": every}
        return changed(RatsConfig(), {"steps": steps, "tracker": tracker, **inner})

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(written(4)))
    refuse_others(tmp_path / "run", written(6, tracker="mlflow"), tmp_path)
    for other in (written(3), written(6, guided_steps=6), written(6, every=6)):
        with pytest.raises(RunDirError, match="another configuration"):
            refuse_others(tmp_path / "run", other, tmp_path)
    (tmp_path / "run" / "config.json").write_text(to_json(written(4, guided_steps=4)))
    refuse_others(tmp_path / "run", written(6, guided_steps=6), tmp_path)
    (tmp_path / "run" / "finished").write_text("")
    with pytest.raises(RunDirError, match="a finished run of 4 steps: to continue from it, use --init"):
        refuse_others(tmp_path / "run", written(6, guided_steps=6), tmp_path)


def test_a_bounded_target_lies_along_the_slope_at_its_own_distance() -> None:
    data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    slope = torch.tensor([[0.0, 10.0], [0.0, 0.0]])
    assert torch.allclose(bounded_target(data, slope, 0.1), torch.tensor([[3.0, 4.5], [0.0, 2.0]]))


def test_tuning_raises_the_reward_of_few_steps_and_begins_at_the_bound() -> None:
    base = {"method": "tune", "student.nfe": (2,), "teacher.nfe": 2, "teacher.ema": 0.9, "compute.precision": "fp32"}
    config = changed(RatsConfig(), base)
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, config.teacher.ema)
    grid = model.sigmas(2, X.shape[1:])

    def reward(images: Tensor, prompts: Any) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

    method = Tune(config, roles, reward, {2: grid})
    optimizer = torch.optim.AdamW(roles.trainable, 3e-4)
    losses, rewards, places = [], [], set()
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for step in range(24):
        [batch] = method.teach([Batch(step, 0, 2, ["a ring"] * 4, noise)])
        assert batch.teacher is not None and batch.teacher.sigmas == tuple(grid)
        with torch.no_grad():
            rewards.append(float(reward(model.decode(batch.teacher.x[-1]), None).mean()))
        optimizer.zero_grad()
        loss, backward, log = method.step(batch)
        backward()
        optimizer.step()
        roles.follow()
        losses.append(float(loss.detach()))
        places.add(log["sigma"])
    assert places == set(grid), "each of the rollout's steps is tuned"
    assert losses[0] == pytest.approx(1.0, abs=1e-3), "the student is its average, so the target is a whole bound away"
    assert rewards[-1] > rewards[0] + 0.01


def test_tuning_is_measured_against_the_model_as_it_was() -> None:
    config = resolved("z-image-turbo", ["method=tune", "student.nfe=[8]"])
    assert (config.teacher.nfe, config.teacher.reference_nfe, config.teacher.guided_steps) == (8, 8, 0)
    several = resolved("sd35-medium", ["method=tune", "student.nfe=[4,8,2]"]).teacher
    assert (several.nfe, several.reference_nfe, several.guidance, several.guided_steps) == (8, 8, 1.0, 0)
    assert resolved("sd35-medium", ["method=tune", "teacher.nfe=20", "teacher.guidance=3"]).teacher.nfe == 20
    assert resolved("flux-dev", ["student.init=x", "steps=77"]).teacher.guided_steps == 77
    assert resolved("flux-dev", ["student.init=x", "teacher.guided_steps=5"]).teacher.guided_steps == 5


def test_a_tuned_run_ends_in_a_student(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = settings(tmp_path, "z_image", steps=2, lora_rank=2, **{"tune.gate": "true"})
    code, text = run("--tune", "--out", str(out), *more)
    assert code == 0, text
    rows = [row for row in read_log(out / "run" / "log.jsonl") if row["step"] >= 0]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and 0 < row["gate_mean"] < 1 for row in rows)
    assert DiffusionPipeline.from_pretrained(out) is not None
    assert "-step student tuned by a reward\n" in (out / "README.md").read_text()


def test_a_picture_that_the_reward_leads_nowhere_is_held_where_the_average_has_it() -> None:
    config = changed(RatsConfig(), {"method": "tune", "student.nfe": (1,), "compute.precision": "fp32"})
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, 0.9)
    method = Tune(config, roles, lambda images, _: 0 * images.sum((1, 2, 3)), {1: (1.0,)})
    [batch] = method.teach([Batch(0, 0, 1, ["a ring"] * 2, torch.cat([X, -X]))])
    assert float(method.step(batch).loss.detach()) == 0
    with torch.no_grad():
        for p in roles.trainable:
            p.add_(0.01)
        found = batch.noise_BCHW - model.velocity(batch.noise_BCHW, 1.0, model.encode(batch.prompts))
    assert batch.teacher is not None
    data = batch.teacher.x[-1]
    moved_B = (found - data).flatten(1).norm(dim=1) / (config.tune.radius * data.flatten(1).norm(dim=1))
    assert 0 < float(method.step(batch).loss.detach()) == pytest.approx(float(moved_B.square().mean()), rel=1e-3)


@pytest.mark.parametrize("branches", [0, 3])
def test_a_picture_that_scores_above_the_hinge_is_left_where_it_is(branches: int) -> None:
    base = {"method": "tune", "student.nfe": (1,), "compute.precision": "fp32", "tune.branches": branches}
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, 0.9)

    def loss_at(hinge: float) -> float:
        config = changed(RatsConfig(), {**base, "reward.hinge": hinge})
        method = Tune(config, roles, lambda images, _: images.mean((1, 2, 3)), {1: (1.0,)})
        [batch] = method.teach([Batch(0, 0, 1, ["a ring"] * 2, torch.cat([X, -X]))])
        return float(method.step(batch).loss.detach())

    assert loss_at(-10.0) == 0 and loss_at(10.0) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["reward", "one"])
def test_the_gate_weighs_each_sample_by_how_far_its_target_is_ahead(kind: str) -> None:
    base = {"method": "tune", "student.nfe": (1,), "compute.precision": "fp32", "tune.gate": True, "tune.radius": 0.5}
    config = changed(RatsConfig(), {**base, "gate.kind": kind, "gate.tau": 0.1})
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, 0.9)

    def reward(images: Tensor, prompts: Any) -> Tensor:
        level_B = images.mean((1, 2, 3))
        return level_B * torch.tensor([1.0, 40.0])[: len(images)]

    method = Tune(config, roles, reward, {1: (1.0,)})
    [batch] = method.teach([Batch(0, 0, 1, ["a ring"] * 2, torch.cat([X, -X]))])
    with torch.no_grad():
        for p in roles.trainable:
            p.add_(0.01)
    loss, backward, log = method.step(batch)
    backward()
    assert batch.teacher is not None
    data = batch.teacher.x[-1]
    leaf = data.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(model.decode(leaf), None).sum(), leaf)
    target = bounded_target(data, slope, 0.5)
    found = batch.noise_BCHW - model.velocity(batch.noise_BCHW, 1.0, model.encode(batch.prompts))
    with torch.no_grad():
        ahead_B = reward(model.decode(target), None) - reward(model.decode(found), None)
    gate_B = torch.sigmoid(ahead_B / 0.1) if kind == "reward" else torch.ones(2)
    far_B = (found - target).flatten(1).norm(dim=1) / (0.5 * data.flatten(1).norm(dim=1))
    expected = (gate_B * far_B.square()).mean()
    assert kind == "one" or float(gate_B.max() - gate_B.min()) > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    slopes = torch.autograd.grad(expected, roles.trainable, allow_unused=True)
    for p, slope in zip(roles.trainable, slopes, strict=True):
        if slope is not None:
            torch.testing.assert_close(p.grad, slope, rtol=1e-3, atol=1e-5)
    assert log["gap"] == pytest.approx(-float(ahead_B.mean()), rel=1e-3, abs=1e-5)
    assert log["gate_mean"] == pytest.approx(float(gate_B.mean()), rel=1e-4)


def test_the_gates_unit_is_in_the_checkpoint_of_a_tuned_run() -> None:
    config = changed(RatsConfig(), {"method": "tune", "tune.gate": True, "gate.tau_in_std": True})
    one, other = (Tune(config, None, None, {}) for _ in range(2))  # type: ignore[arg-type]
    one.after_step({"gap_std": 0.5})
    other.load_state(one.state())
    assert other.gate.gap_std == one.gate.gap_std == 0.5


def test_a_lora_of_the_hub_is_a_repository_and_a_file_and_a_local_one_is_not_looked_for_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def fetched(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "nobody/nothing":
            raise OSError("404 Client Error.\nmore")
        return str(tmp_path / "fetched.safetensors")

    monkeypatch.setattr(module, "hf_hub_download", fetched)
    assert module._adapter("owner/lora:sub/file.safetensors") == tmp_path / "fetched.safetensors"
    assert asked == [("owner/lora", "sub/file.safetensors")]
    with pytest.raises(BundleError, match=r"nobody/nothing:x.safetensors cannot be opened .*: 404 Client Error\.$"):
        module._adapter("nobody/nothing:x.safetensors")
    asked.clear()
    monkeypatch.chdir(tmp_path)
    Path("a:b.safetensors").write_bytes(b"")
    assert module._adapter("a:b.safetensors") == Path("a:b.safetensors")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert module._adapter(str(tmp_path)) == tmp_path / "pytorch_lora_weights.safetensors"
    (tmp_path / "empty").mkdir()
    assert module._adapter("owner/model") is None and module._adapter(str(tmp_path / "empty")) is None and not asked
