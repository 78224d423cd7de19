"""A quantised base under adapters, and an optimizer of 8 bits: on the CPU, where their packages are installed."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce, shift_no_more
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.config import ConfigError, with_settings
from training.quantise import adamw, linear_layers, quantise, require
from training.rats.config import RatsConfig
from training.rats.roles import Lora, Roles
from training.steplog import read_log

needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_ao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
FORMS = [pytest.param("nf4", marks=needs_bnb), pytest.param("fp8", marks=needs_ao)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def test_a_missing_package_is_named_before_anything_is_opened(tmp_path: Path) -> None:
    absent = {"nf4": "no_such_package"}
    with pytest.raises(ConfigError, match="compute.quantise is 'nf4': it needs the package no_such_package"):
        require("compute.quantise", "nf4", absent)
    require("compute.quantise", "", absent)


@pytest.mark.parametrize(
    "changes",
    [["compute.quantise=nf4"], ["compute.quantise=nf4", "lora.rank=2"], ["compute.quantise=fp4", "lora.rank=2"]],
)
def test_what_cannot_be_quantised_is_refused(changes: list[str]) -> None:
    with pytest.raises(ConfigError, match="compute.quantise is"):
        with_settings(RatsConfig(), changes)


@pytest.mark.parametrize("family", tiny.MAKERS)
def test_what_is_narrowed_is_every_linear_layer_of_every_list_of_blocks_and_no_other(family: str) -> None:
    transformer = tiny.MAKERS[family]().transformer
    lists = {name: part for name, part in transformer.named_children() if isinstance(part, nn.ModuleList)}
    inside = {
        f"{name}.{inner}"
        for name, blocks in lists.items()
        for inner, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }
    found = dict(linear_layers(transformer))
    assert set(found) == inside and len({name.partition(".")[0] for name in found}) == len(lists) > 0
    outer = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and name not in found]
    assert outer, "what stands before and after the blocks stays as it is"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_the_blocks_are_narrow_and_close_and_their_input_has_a_gradient(form: str, family: str) -> None:
    transformer = tiny.MAKERS[family]().transformer.bfloat16().requires_grad_(False)
    sizes = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    inner = next(name for name in sizes if "blocks" in name or name.startswith("layers"))
    outer = next(name for name in sizes if "blocks" not in name and not name.startswith("layers"))
    before = sizes[inner]
    x = torch.randn(8, before.in_features, dtype=torch.bfloat16, requires_grad=True)
    expected = before(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    quantise(transformer, form)
    transformer.to("cpu")
    after = transformer.get_submodule(inner)
    y = after(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    close = 0.25 if form == "nf4" else 0.05
    assert 0 < (y - expected).norm() < close * expected.norm() and (found - slope).norm() < close * slope.norm()
    assert transformer.get_submodule(outer) is sizes[outer]
    kept = after.weight.nbytes if form == "nf4" else after.weight.qdata.nbytes
    assert kept * (4 if form == "nf4" else 2) == before.in_features * before.out_features * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_a_quantised_base_writes_an_adapter_and_a_bundle_of_the_whole_base(form: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"lora_rank": 2, "weights": "bf16", "precision": "bf16", "compute.quantise": form, "lr": 0.01, "alpha": 0.1}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", steps=3, gradient="detached", **more))
    assert code == 0, text
    rows = [row for row in read_log(out / "run" / "log.jsonl") if row["step"] >= 0]
    assert all(row["grad_norm"] > 0 for row in rows)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "flux")
    pipe.load_lora_weights(out / "adapter")
    student = read_student(out)
    drawn = []
    for one in (pipe, open_pipeline(out), open_pipeline(tmp_path / "flux")):
        shift_no_more(one)
        drawn.append(reproduce(one, student, ["a red heart number 3"], [5], 3))
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.2 * np.abs(drawn[2] - drawn[1]).mean()


@needs_bnb
@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_of_8_bits_descends_and_goes_on_exactly() -> None:
    torch.manual_seed(0)
    target = torch.randn(96, 96)

    def start() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(torch.zeros(96, 96))
        return weight, adamw([weight], 0.05, "8bit")

    def descend(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (weight - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    weight, optimizer = start()
    descend(weight, optimizer, 10)
    assert next(iter(optimizer.state.values()))["state1"].dtype == torch.uint8
    kept, state = weight.detach().clone(), optimizer.state_dict()
    again, other = start()
    again.data.copy_(kept)
    other.load_state_dict(state)
    assert descend(weight, optimizer, 20) == descend(again, other, 20) < 0.5
    assert torch.equal(weight, again)


@needs_bnb
@pytest.mark.filterwarnings("ignore")
def test_adapters_learn_on_a_narrow_base_that_stays_as_it_is() -> None:
    from student.families.find import family_of

    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    model.transformer.bfloat16()
    quantise(model.transformer, "nf4")
    model.transformer.to("cpu")
    roles = Roles(model, 0.5, Lora(2, 4.0))
    x = torch.randn(1, *model.latent_shape(32, 32))
    model.velocity(x, 0.5, model.encode(["a red heart"])).square().mean().backward()
    assert len(roles.trainable) > 4 and all(p.dtype == torch.float32 for p in roles.trainable)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.trainable)


@needs_bnb
def test_a_paged_state_is_that_of_plain_adamw() -> None:
    """On a CPU nothing is paged, as bitsandbytes says; the numbers are those of torch's own."""
    found = []
    for state in ("fp32", "paged"):
        weight = nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64))
        optimizer = adamw([weight], 0.05, state)
        for step in range(5):
            optimizer.zero_grad()
            (weight * torch.randn(64, 64, generator=torch.Generator().manual_seed(step))).sum().backward()
            with pytest.warns(UserWarning, match="Paged") if state == "paged" and step == 0 else nullcontext():
                optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert (found[0] - torch.linspace(-1, 1, 4096).view(64, 64)).abs().max() > 0.1


def test_a_paged_state_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="optim.state is 'paged': it needs the package bitsandbytes"):
        require("optim.state", "paged")
