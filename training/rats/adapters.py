"""LoRA adapters (peft) on a transformer: the student's and its average's, side by side on one base."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

# Attention and feed-forward of every family's blocks, and nothing outside of them; what a model lacks is not missed.
LORA_TARGETS = (
    r"(.*\.)?((\w*blocks|layers|\w*refiner)\.\d+\.(.*\.)?"
    r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2"
    r"|to_qkv_mlp_proj|linear_in|linear_out"  # FLUX.2
    r"|feed_forward\.w[123])"  # Z-Image
    r"|single_transformer_blocks\.\d+\.attn\.to_out)"  # FLUX.2
)


@dataclass(frozen=True)
class Lora:
    """Rank and scale of the adapters, and the seed of their initial weights: the same in every process and restart."""

    rank: int
    alpha: float
    seed: int = 0


def add_adapters(transformers: Sequence[Any], lora: Lora) -> None:
    """Two adapters, ``teacher`` and ``student``, on each of the transformers."""
    scale: Any = lora.alpha  # any number will do, whatever the annotation says
    config = LoraConfig(r=lora.rank, lora_alpha=scale, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    device = next(transformers[0].parameters()).device
    with warnings.catch_warnings(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        torch.manual_seed(lora.seed)
        for transformer in transformers:
            for name in ("teacher", "student"):
                transformer.add_adapter(config, adapter_name=name)


def equalise(transformers: Sequence[Any]) -> None:
    """Give both adapters the same weights.

    They are fp32 on a base of any type: in bf16 updates with a small learning rate round to nothing.
    """
    for transformer in transformers:
        for student, teacher in zip(*pairs(transformer), strict=True):
            student.data = student.data.float()
            teacher.data = student.data.clone()
            teacher.requires_grad_(False)


def pairs(base: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The student's and the teacher's adapters, in the same order."""
    named = dict(base.named_parameters())
    pairs = [(p, named[name.replace(".student.", ".teacher.")]) for name, p in named.items() if ".student." in name]
    return [student for student, _ in pairs], [teacher for _, teacher in pairs]


def switch(transformers: Sequence[Any], name: str) -> None:
    """Let the base answer alone (``start``), or with the adapter of this name."""
    for transformer in transformers:
        if name == "start":
            transformer.disable_adapters()
        else:
            transformer.enable_adapters()
            transformer.set_adapter(name)


def write_adapter(folder: Path, transformer: Any, lora: Lora, pipeline: Any) -> None:
    """Write the student's adapter by the pipeline class's own saver.

    ``pipe.load_lora_weights(folder)`` and programs that read the same format can open it. Some of these ignore alpha
    and assume the rank: the scale is in the weights.
    """
    scale = lora.alpha / lora.rank
    state: dict[str, Tensor] = {
        name: (value * scale if ".lora_B." in name else value).detach().cpu().contiguous()
        for name, value in get_peft_model_state_dict(transformer, adapter_name="student").items()
    }
    pipeline.save_lora_weights(folder, transformer_lora_layers=state)
