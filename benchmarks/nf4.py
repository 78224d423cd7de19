"""Linear layers as bitsandbytes lays them out in nf4, on a device that is not there (benchmarks/make_believe.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.make_believe import NARROW, fake
from training.quantise import linear_layers


class Nf4(nn.Linear):
    """4 bits a weight, and doubly quantised constants; the weights are widened for each call, forward and backward."""

    def __init__(self, like: nn.Linear, mode: FakeTensorMode) -> None:
        with torch.device("meta"):
            super().__init__(like.in_features, like.out_features, False)
        device, num = like.weight.device.type, like.weight.numel()
        with torch.device("meta"):
            packed, constants = torch.empty(num // 2, 1, dtype=torch.uint8), torch.empty(num // 64, dtype=torch.uint8)
            scales = torch.empty(-(-num // (64 * 256)))
        self.weight = nn.Parameter(fake(packed, mode, NARROW, device), requires_grad=False)
        self.bias = like.bias
        self.register_buffer("constants", fake(constants, mode, NARROW, device))
        self.register_buffer("scales", fake(scales, mode, torch.float32, device))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = _Widened.apply(x.to(NARROW), self.weight, (self.out_features, self.in_features))
        return found if self.bias is None else found + self.bias


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0] @ slopes[0].new_empty(ctx.shape), None, None


def to_nf4(transformer: nn.Module, mode: FakeTensorMode) -> None:
    """Lay the linear layers of a transformer's blocks out so."""
    for name, layer in linear_layers(transformer):
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, Nf4(layer, mode))
