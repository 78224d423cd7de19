"""What is counted of memory is what torch's own tracker counts, and the networks that are counted are the published."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.full_size import MODELS, without_weights
from benchmarks.make_believe import DEVICE, Peak, attention, fake_device, num_bytes, put
from benchmarks.memory_figures import FIGURES, Row, keep, line, read
from benchmarks.nf4 import Nf4
from tests.alone import alone

pytestmark = alone

# In 10^9 parameters, as the models' own cards and indexes of weights say (of SD 3.5 its table of places is a buffer).
PUBLISHED = {
    "flux-dev": 11.90,
    "sd35-medium": 2.24,
    "wan-1.3b": 1.42,
    "wan-2.2-5b": 5.00,
    "wan-14b": 14.29,  # each of its two experts
    "flux2-klein": 3.88,
    "qwen-image": 20.43,
    "z-image-turbo": 6.15,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_that_are_counted_are_of_the_published_size(name: str) -> None:
    model = without_weights(MODELS[name])
    num = sum(parameter.numel() for parameter in model.transformer.parameters())
    assert num / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with fake_device() as mode:
        yield mode


def network(mode: FakeTensorMode) -> nn.Sequential:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 256))
    put(net, mode, torch.float32)
    return net.requires_grad_(True)


def test_the_peak_of_a_step_is_that_of_torchs_own_tracker(mode: FakeTensorMode) -> None:
    net, x = network(mode), torch.ones(64, 256).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    tracker = MemTracker()
    tracker.track_external(net, optimizer, x)
    with tracker:
        step()
    [theirs] = [kinds for device, kinds in tracker.get_tracker_snapshot("peak").items() if device.type == DEVICE]
    with Peak() as peak:
        peak.hold(net)
        for value in (x, *(value for slot in optimizer.state.values() for value in slot.values())):
            peak.count(value)
        step()
    assert peak.most == theirs["Total"] > 0


def test_the_peak_of_a_sharded_step_is_that_of_torchs_own_tracker() -> None:
    """One process of 8: what is gathered for a call and given back, and slices of weights, gradients and state."""
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh, policy = init_device_mesh("cpu", (8,)), MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def sharded() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        with torch.device("meta"):
            net = nn.Sequential(*(nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in "abc"))
        put(net, mode, torch.float32, "cpu")
        for unit in (*net.requires_grad_(True), net):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        return net, torch.optim.AdamW(net.parameters(), 1e-3)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = torch.ones(64, 256)
            net, optimizer = sharded()
            step(net, optimizer)
            tracker = FSDPMemTracker(net, optimizer)
            tracker.track_inputs((x,))
            with tracker:
                step(net, optimizer)
            [theirs] = tracker.get_tracker_snapshot("peak").values()
            with Peak("cpu") as peak:
                net, optimizer = sharded()
                gc.collect()
                whole = 3 * 4 * (2 * 256 * 512 + 512 + 256)
                assert whole / 8 <= peak.now < 1.01 * whole / 8, "of what was whole an eighth is left"
                step(net, optimizer)
                peak.restart()
                step(net, optimizer)
    finally:
        torch.distributed.destroy_process_group()
    assert peak.most == pytest.approx(theirs["Total"] - x.nbytes, rel=1e-3)


def test_attention_under_autocast_is_the_flash_kernels(mode: FakeTensorMode) -> None:
    q = torch.ones(1, 4, 4096, 64).to(DEVICE)
    with Peak() as peak, torch.autocast(DEVICE, torch.bfloat16):
        found = nn.functional.scaled_dot_product_attention(q, q, q)
    assert found.dtype == torch.bfloat16 and peak.most < 8 * q.nbytes


def test_autocast_narrows_products_widens_norms_and_keeps_its_copies_until_it_ends(mode: FakeTensorMode) -> None:
    net, x = network(mode), torch.ones(64, 256).to(DEVICE)
    with Peak() as peak:
        with torch.autocast(DEVICE, torch.bfloat16):
            y = net[0](x)
            assert y.dtype == torch.bfloat16 and net[2](y).dtype == torch.float32
            kept = peak.now
        assert kept - peak.now >= 2 * 256 * 512


def test_attention_keeps_no_square_of_its_tokens(mode: FakeTensorMode) -> None:
    q = torch.ones(1, 4, 4096, 64, dtype=torch.bfloat16).to(DEVICE).requires_grad_()
    with Peak() as peak:
        attention(q, q, q).sum().backward()
    assert peak.most < 8 * q.nbytes, "a square would be 64 times a query"


def test_a_layer_in_nf4_is_widened_for_a_call_and_no_longer(mode: FakeTensorMode) -> None:
    with torch.device("meta"):
        wide = nn.Linear(4096, 4096, False)
    put(wide, mode, torch.bfloat16)
    narrow = Nf4(wide, mode)
    assert num_bytes(narrow) / num_bytes(wide) == pytest.approx(0.25 + 1 / 128, rel=0.01), "8 bits for 64 of 4 bits"
    z: Tensor = torch.ones(8, 4096).to(DEVICE).requires_grad_()
    with Peak() as peak:
        narrow(z).sum().backward()
    assert num_bytes(wide) <= peak.most < 1.2 * num_bytes(wide)
    assert z.grad is not None and z.grad.shape == (8, 4096)


def test_rows_are_kept_in_their_order_and_shown(tmp_path: Path) -> None:
    peak = dict.fromkeys(("teacher", "student", "backward", "update", "validation"), 2.0)
    rows = [Row(name, "flux-dev", {}, 1, 23.0, {"weights": 1.0, "learnt": 0.5}, peak) for name in ("b", "a")]
    for row in rows:
        keep(row, ["a", "b"], tmp_path / "kept.json")
    assert [row.name for row in read(tmp_path / "kept.json")] == ["a", "b"]
    assert line(rows[1]) == "| a | 1.0 | 0.5 | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 23 |"


def test_what_was_counted_keeps_its_aims() -> None:
    rows = read(FIGURES)
    assert rows and all(row.limit_gb is None or row.most <= row.limit_gb for row in rows)
