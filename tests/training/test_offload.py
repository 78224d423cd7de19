"""AdamW with its moments in main memory has the bits of torch's own, and no more of them on the device than a part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.make_believe import DEVICE, Peak, fake_device, put
from tests.alone import alone
from training import offload
from training.config import ConfigError, with_settings
from training.offload import MOMENTS, OffloadedAdamW
from training.optim import set_lr
from training.quantise import adamw
from training.rats.config import RatsConfig

SIZES = ((64, 32), (8,), (16, 16), (64, 32))


def start(state: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    gen = torch.Generator().manual_seed(5)
    parameters = [nn.Parameter(torch.randn(size, generator=gen)) for size in SIZES]
    return parameters, adamw(parameters, 0.05, state)


def descend(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for at, parameter in enumerate(parameters):
            parameter.grad = None if at == 1 and step == 0 else torch.randn(parameter.shape, generator=gen)
        set_lr(optimizer, 0.05 / (1 + step))
        optimizer.step()


@pytest.mark.parametrize("part_bytes", [1, 4 * (64 * 32 + 8), 2**28])
def test_the_bits_are_those_of_torchs_own_in_parts_of_any_size(
    part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "PART_BYTES", part_bytes)
    (plain, its), (parameters, optimizer) = start("fp32"), start("offload")
    for parameter, own in ((plain, its), (parameters, optimizer)):
        descend(parameter, own, range(4))
    assert isinstance(optimizer, OffloadedAdamW) and len(optimizer.param_groups[0]["params"]) == len(SIZES)
    for one, other in zip(plain, parameters, strict=True):
        assert torch.equal(one, other)
        assert its.state[one].keys() == optimizer.state[other].keys()
        assert all(torch.equal(value, optimizer.state[other][name]) for name, value in its.state[one].items())
    assert float(optimizer.state[parameters[1]]["step"]) == 3, "it had no gradient once"


@pytest.mark.parametrize("state", ["fp32", "offload"])
def test_it_is_adam_with_shares_of_a_tenth_and_a_hundredth_and_without_decay(state: str) -> None:
    """In closed form, after gradients of 2 and 1; a weight without a gradient stays."""
    weight, still = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = adamw([weight, still], 0.25, state)
    expected, slope, square = 3.0, 0.0, 0.0
    for step, gradient in enumerate((2.0, 1.0), 1):
        weight.grad, still.grad = torch.tensor([gradient]), torch.zeros(1)
        optimizer.step()
        slope, square = 0.9 * slope + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        expected -= 0.25 * (slope / (1 - 0.9**step)) / (square / (1 - 0.99**step)) ** 0.5
        assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert still.item() == 3.0


def test_it_goes_on_exactly_from_its_own_state_and_from_that_of_torchs() -> None:
    (plain, its), (parameters, optimizer) = start("fp32"), start("offload")
    descend(plain, its, range(2))
    descend(parameters, optimizer, range(2))
    for state in (its.state_dict(), optimizer.state_dict()):
        again, other = start("offload")
        for value, kept in zip(again, plain, strict=True):
            value.data.copy_(kept)
        other.load_state_dict(state)
        assert other.param_groups[0]["lr"] == 0.025
        descend(again, other, range(2, 5))
        assert len(state["state"]) == len(SIZES) and float(state["state"][0]["step"]) == 2, "it is a copy"
        reference, wanted = start("fp32")
        descend(reference, wanted, range(5))
        assert all(torch.equal(one, two) for one, two in zip(again, reference, strict=True))


@alone
def test_the_device_holds_the_moments_of_one_part_and_main_memory_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 1024
    layer = 4 * width * width
    monkeypatch.setattr(offload, "PART_BYTES", layer)
    with fake_device() as mode:
        with torch.device("meta"):
            net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
        put(net, mode, torch.float32)
        net.requires_grad_(True)

        def most(optimizer: torch.optim.Optimizer) -> int:
            with Peak() as peak:
                peak.hold(net)
                for parameter in net.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                before = peak.now
                optimizer.step()
                peak.restart()
                optimizer.step()
            found: dict[str, set[str]] = {name: set() for name in ("step", *MOMENTS)}
            for slot in optimizer.state.values():
                for name, value in slot.items():
                    found[name].add(value.device.type)
            assert found == {"step": {"cpu"}, **dict.fromkeys(MOMENTS, {where})}
            return peak.most - before

        where = DEVICE
        plain = most(adamw(list(net.parameters()), 1e-3, "fp32"))
        where = "cpu"
        offloaded = most(adamw(list(net.parameters()), 1e-3, "offload"))
    assert plain >= 8 * 2 * layer
    assert 2 * layer <= offloaded <= 5 * layer, "moments of one layer, and what the update computes with"


def test_what_a_sharded_run_may_keep_its_moments_in() -> None:
    with_settings(RatsConfig(), ["optim.state=offload", "compute.shard=true"])
    with pytest.raises(ConfigError, match="optim.state is '8bit': accepted with compute.shard are fp32, offload"):
        with_settings(RatsConfig(), ["optim.state=8bit", "compute.shard=true"])


def test_gradients_that_overflow_leave_all_groups_in_place() -> None:
    parameters, optimizer = start("offload")
    parameters[0].grad = torch.ones(SIZES[0])
    broken: Tensor = torch.ones(SIZES[2])
    parameters[2].grad = broken.to_sparse()  # which AdamW refuses
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(SIZES)
