"""Wan 2.2 14B's two experts in training: which of them a step calls, moves, saves and brings back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from student.base import NETWORKS
from student.bundle import read_student
from student.families.family import Family
from student.families.find import family_of
from student.families.two_experts import called_at, joined, networks
from student.noise import noise
from student.pipeline import open_pipeline, read_index, reproduce, shift_no_more
from student.runtimes.load import load
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.beginning import beginning
from training.config import ConfigError, changed, with_settings
from training.experiment.presets import preset
from training.experiment.setup import learning, prepare
from training.quantise import linear_layers, quantise
from training.rats.config import RatsConfig
from training.rats.roles import Roles
from training.rats.trainer import Trainer
from training.usage import plain

SHAPE = (4, 2, 4, 4)
BOUNDARY = 0.875  # of tiny.wan_14b, between the first and the second of three steps
PROMPT = "a red heart number 3"
LORA = {"lora.rank": 2, "gradient.mode": "detached"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def opened(seed: int = 0) -> Family:
    return joined(family_of(tiny.wan_14b(seed), max_tokens=tiny.MAX_TOKENS))


def trainer(folder: Path, **more: Any) -> Trainer:
    base = {
        "steps": 4, "optim.batch": 1, "optim.accumulate": 2, "teacher.nfe": 5, "student.nfe": (3,), "optim.lr": 1e-2,
        "optim.warmup": 1, "compute.precision": "fp32", "teacher.ema": 0.5,
    }  # fmt: skip
    config, model = changed(RatsConfig(), {**base, **more}), opened()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, :, 0].mean((1, 2, 3)) - images[:, :, 1].mean((1, 2, 3))

    return Trainer(
        config,
        Roles.of(config, model, learning=learning(config, model, SHAPE)),
        folder,
        prompts=lambda step, num: [f"a red heart number {step + i}" for i in range(num)],
        reward=reward,
        validate=lambda samplers, step: {"heldout_validation": float(step)},
        latent_shape=SHAPE,
    )


def weights(running: Trainer, role: str) -> dict[str, dict[str, Tensor]]:
    """Copies of what may learn, by expert."""
    with running.roles.role(role) as model:
        parts = networks(model.transformer)
        return {name: {key: p.detach().clone() for key, p in part.named_parameters()} for name, part in parts.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [key for key, value in before.items() if not torch.equal(value, after[key])]


@pytest.mark.parametrize("more", [{}, LORA])
def test_three_steps_move_both_experts_and_their_average_and_not_the_start(
    more: dict[str, Any], tmp_path: Path
) -> None:
    running = trainer(tmp_path, **more)
    assert called_at(running.grids[3][:1], BOUNDARY) == NETWORKS[:1]
    assert called_at(running.grids[3][1:], BOUNDARY) == NETWORKS[1:]
    before = {role: weights(running, role) for role in ("student", "teacher", "start")}
    for step in range(3):
        assert running._step(step)["grad_norm"] > 0
    for name in NETWORKS:
        changed = moved(before["student"][name], weights(running, "student")[name])
        assert len(changed) > 10 and all(not more or ".lora_" in key for key in changed)
        assert more or len(moved(before["teacher"][name], weights(running, "teacher")[name])) == len(changed)
        assert more or not moved(before["start"][name], weights(running, "start")[name])
    experts = list(weights(running, "student").values())
    assert all(
        not torch.equal(value, experts[1][key]) for key, value in experts[0].items() if key.endswith("to_q.weight")
    )


def test_the_gradient_is_that_of_the_expert_which_was_called() -> None:
    model = opened()
    model.transformer.requires_grad_(True)
    x = torch.from_numpy(noise([1, 2, 3], SHAPE))
    condition = model.encode(tiny.PROMPTS)

    def gradients(sigma: float | Tensor, rows: slice = slice(None)) -> dict[str, list[Tensor]]:
        model.transformer.zero_grad(set_to_none=True)
        model.velocity(x[rows], sigma, condition.take(rows)).square().sum().backward()
        parts = networks(model.transformer).items()
        return {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in parts}

    high, low = gradients(BOUNDARY), gradients(BOUNDARY - 1e-4)
    assert len(high["transformer"]) > 10 and not high["transformer_2"]
    assert not low["transformer"] and len(low["transformer_2"]) == len(high["transformer"])
    times = torch.tensor([0.5, 0.9, BOUNDARY])
    mixed = gradients(times)
    for name, rows in (("transformer", slice(1, 3)), ("transformer_2", slice(0, 1))):
        for found, expected in zip(mixed[name], gradients(times[rows], rows)[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_samples_of_both_sides_are_each_drawn_by_their_own_expert(dtype: str) -> None:
    model, times = opened(), torch.tensor([0.2, 0.95, 0.6])
    x, condition = torch.from_numpy(noise([1, 2, 3], SHAPE)), model.encode(tiny.PROMPTS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        together = model.velocity(x, times, condition)
        alone = [model.velocity(x[i, None], float(times[i]), condition.take(i)) for i in range(3)]
        swapped = model.velocity(x, times.flip(0), condition)
    close = 1e-4 if dtype == "fp32" else 0.25
    assert (together - torch.cat(alone)).abs().max() < close * (together - swapped).abs().max()


@pytest.mark.parametrize("more", [{}, LORA])
def test_an_expert_that_no_step_calls_is_left_as_it_is(more: dict[str, Any], tmp_path: Path) -> None:
    running = trainer(tmp_path, **{"student.nfe": (1,), **more})
    before = weights(running, "student")
    assert {id(p) for p in running.roles.trainable} <= {
        id(p) for p in networks(running.roles.model.transformer)["transformer"].parameters()
    }
    for step in range(2):
        running._step(step)
    after = weights(running, "student")
    assert moved(before["transformer"], after["transformer"]) and not moved(
        before["transformer_2"], after["transformer_2"]
    )
    assert not any("lora" in key for key in after["transformer_2"])
    consistency = changed(running.config, {"method": "consistency"})
    assert learning(consistency, running.roles.model, SHAPE) == NETWORKS, "which learns at every point of the teacher's"
    if more:
        running.roles.write_adapter(tmp_path / "adapter", type(tiny.wan_14b()))
        assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [tmp_path / "adapter"]


@pytest.mark.parametrize("more", [{}, LORA, {"compute.shard": True}])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(more: dict[str, Any], tmp_path: Path) -> None:
    """With step counts of which one leaves the second expert out: its optimizer has made fewer steps."""
    more = {**more, "student.nfe": (1, 3), "steps": 6}
    whole, first, second = (trainer(tmp_path / name, **more) for name in ("whole", "part", "part"))
    counts = {whole._step(step)["nfe"] for step in range(6)}
    assert counts == {1.0, 3.0}
    for step in range(3):
        first._step(step)
    first._validate(0)
    first._save(3)
    assert second._resume() == 3
    for step in range(3, 6):
        second._step(step)
    for role in ("student", "teacher"):
        expected, found = weights(whole, role), weights(second, role)
        assert not [key for name in NETWORKS for key in moved(expected[name], found[name])], role


def drawn(pipe: Any, bundle: Path) -> np.ndarray:
    return reproduce(pipe, read_student(bundle), [PROMPT], [5], 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's pipeline, and the bundles of a LoRA run with all of its pipeline and with its adapter alone."""
    found = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.evaluate.CACHE", found / "cache")
        for kind in ("whole", "adapter"):
            more = {"lora_rank": 2, "lr": 0.05, "warmup": 1, "student.bundle": kind, "steps": 2, "alpha": 0.1}
            more |= {"heldout": "tests.training.rats.test_families:Same"}  # which chooses a step of the run's
            code, text = run("--out", str(found / kind), *settings(found, "wan_14b", **more))
            assert code == 0, text
    return found


def test_the_adapters_draw_the_students_own_picture_in_diffusers(folder: Path) -> None:
    expected = drawn(open_pipeline(folder / "whole"), folder / "whole")
    pipe = DiffusionPipeline.from_pretrained(folder / "wan_14b")
    shift_no_more(pipe)
    found = []
    for arguments in ({}, {"load_into_transformer_2": True}):
        inside = folder / "whole" / "adapter"
        pipe.load_lora_weights(inside / "transformer_2" if arguments else inside, **arguments)
        found.append(drawn(pipe, folder / "whole"))
    without, close = (np.abs(one - expected).max() for one in found)
    assert close < 5e-3 < 0.02 < without, "the whole bundle is kept in fp16"
    before, after = (
        [load_file(next((folder / kind / name).glob("*.safetensors"))) for name in NETWORKS]
        for kind in ("wan_14b", "whole")
    )
    for teacher, student in zip(before, after, strict=True):
        assert any((value - student[key].float()).abs().max() > 0.01 for key, value in teacher.items())


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_torch_runtime_serves_what_diffusers_draws_and_the_card_says_so(kind: str, folder: Path) -> None:
    bundle = folder / kind
    expected = drawn(open_pipeline(bundle), bundle)
    np.testing.assert_allclose(load(bundle, "torch").draw([PROMPT], [5], 3), expected, atol=2e-3)
    assert np.abs(drawn(open_pipeline(folder / "wan_14b"), bundle) - expected).max() > 0.01
    card, base = (bundle / "README.md").read_text(), str(folder / "wan_14b") if kind == "adapter" else ""
    assert "The expert for high noise takes 1 of 3 steps (sigmas from 0.875 on)" in card
    code = plain(read_student(bundle), read_index(bundle), "fp32", base)
    assert code in card and code.count("load_into_transformer_2=True") == (kind == "adapter")
    lines = code.replace(f"models/{read_student(bundle).id}", str(bundle)).partition("\n# WanPipeline")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    shift_no_more(names["pipe"])
    assert np.abs(drawn(names["pipe"], bundle) - expected).max() < 1e-4


def test_another_run_begins_from_both_adapters_and_half_of_them_is_refused(folder: Path, tmp_path: Path) -> None:
    like, teacher = opened().transformer, str(folder / "wan_14b")
    found = beginning(str(folder / "whole" / "adapter"), teacher, like, torch.float32)
    again = beginning(str(folder / "adapter"), teacher, like, torch.float32)
    whole = beginning(str(folder / "whole"), teacher, like, torch.float32)
    for key, value in whole.state_dict().items():
        for other in (found, again):
            torch.testing.assert_close(other.state_dict()[key], value, rtol=5e-3, atol=5e-3)  # kept in fp16
    file = folder / "whole" / "adapter" / "pytorch_lora_weights.safetensors"
    with pytest.raises(ConfigError, match="one file for a model of two experts: accepted is a folder with"):
        beginning(str(file), teacher, like, torch.float32)
    tiny.wan().save_pretrained(tmp_path / "wan")
    single = tiny.wan().transformer
    with pytest.raises(ConfigError, match="an adapter of two experts: accepted is one for one transformer"):
        beginning(str(file.parent), str(tmp_path / "wan"), single, torch.float32)
    with pytest.raises(ConfigError, match="differs from that of .* \\(its class\\)"):
        beginning(teacher, str(tmp_path / "wan"), single, torch.float32)
    config = with_settings(preset("shapes"), [*settings(folder, "wan_14b")[1::2], f"student.init={folder / 'whole'}"])
    setup = prepare(config)
    with setup.roles.role("student") as model:
        begun = model.transformer.state_dict()
    assert all(torch.equal(begun[key], value) for key, value in whole.state_dict().items())


def test_both_experts_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed: list[Any] = []
    monkeypatch.setattr("training.quantise._to_nf4", lambda part: narrowed.append(linear_layers(part)))
    quantise(opened().transformer, "nf4")
    assert len(narrowed) == 2 and all(len(layers) > 5 for layers in narrowed)


def test_a_tuned_run_ends_in_a_student(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = run("--tune", "--out", str(out), *settings(tmp_path, "wan_14b", steps=2))
    assert code == 0, text
    assert set(networks(joined(family_of(open_pipeline(out))).transformer)) == set(NETWORKS)
    sharded = settings(tmp_path, "wan_14b", shard="true")
    code, text = run("--tune", "--out", str(tmp_path / "other"), *sharded)
    assert code == 2 and "has two experts, so accepted is only method=rats" in text, text


def test_a_copy_has_experts_of_its_own() -> None:
    model = opened()
    twin = copy.deepcopy(model.transformer)
    assert twin.boundary == BOUNDARY and twin.transformer_2 is not model.transformer.transformer_2
