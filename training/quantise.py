"""A frozen base in 4 or 8 bits under its adapters, and an optimizer whose state has 8: by the libraries for it.

The base's linear layers inside the blocks are narrowed, as diffusers' own quantisers do it (which want a GPU): ``nf4``
by bitsandbytes (QLoRA, arXiv 2305.14314), ``fp8`` by torchao. What stands before and after the blocks stays as it is.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from student.families.two_experts import networks
from training.config import ConfigError
from training.offload import OffloadedAdamW

PACKAGES = {"nf4": "bitsandbytes", "fp8": "torchao", "8bit": "bitsandbytes", "paged": "bitsandbytes"}
BLOCKS = re.compile(r"(\w*blocks|layers|\w*refiner)\.\d+\..*")


def require(setting: str, value: str, packages: Mapping[str, str] = PACKAGES) -> None:
    """Refuse a setting whose package is not installed.

    Raises:
        ConfigError: says which one.
    """
    package = packages.get(value)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} is {value!r}: it needs the package {package} (`pip install {package}`)")


def quantise(transformer: Any, form: str) -> None:
    """Narrow the linear layers of a transformer's blocks: ``nf4`` when they are put on a device, ``fp8`` at once."""
    for part in networks(transformer).values() if transformer is not None else ():
        if form == "nf4":
            _to_nf4(part)
        elif form == "fp8":
            _to_fp8(part)


def _to_nf4(transformer: Any) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear_layers(transformer):
        with torch.device("meta"):
            narrow = Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
        narrow.weight = Params4bit(layer.weight.data, False, quant_type="nf4", compress_statistics=True, module=narrow)
        narrow.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, narrow.requires_grad_(False))


def _to_fp8(transformer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torchao finds of its own kernels
        from torchao.quantization import Float8WeightOnlyConfig, quantize_

        chosen = {name for name, _ in linear_layers(transformer)}
        quantize_(transformer, Float8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen)


def linear_layers(transformer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those inside the blocks, by name."""
    layers = transformer.named_modules()
    return [(name, part) for name, part in layers if isinstance(part, nn.Linear) and BLOCKS.fullmatch(name)]


def adamw(parameters: list[nn.Parameter], lr: float, state: str) -> torch.optim.Optimizer:
    """AdamW with a state in fp32; the same in main memory ("offload"); in 8 bits block by block (arXiv 2110.02861); or
    paged, which the driver moves between the GPU and main memory (arXiv 2305.14314).
    """
    options: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    if state in ("fp32", "offload"):
        plain = OffloadedAdamW if state == "offload" else torch.optim.AdamW
        return plain(parameters, lr, **options)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW32bit

    made = AdamW8bit if state == "8bit" else PagedAdamW32bit
    found: torch.optim.Optimizer = made(parameters, lr, **options)
    return found
