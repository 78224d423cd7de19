"""Merges a LoRA into a transformer, in any of the formats that diffusers reads (its own, kohya's, xlabs')."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from diffusers.utils import logging as diffusers_log
from torch import Tensor, nn

from export.errors import ExportError

PREFIX = "transformer."
LONGEST = 400  # characters of a reason, which may name every key of the file


@dataclass(frozen=True)
class Lora:
    """A file, a folder or a hub id (OWNER/NAME, or OWNER/NAME/FILE.safetensors), and its weight."""

    source: str
    weight: float = 1.0

    @staticmethod
    def parse(text: str) -> Lora:
        """``PATH_OR_ID[:WEIGHT]``.

        Raises:
            ExportError: a weight that is 0 or not finite.
        """
        head, colon, tail = text.rpartition(":")
        try:
            weight = float(tail) if colon else 1.0
        except ValueError:
            head, weight = text, 1.0
        if not colon:
            head = text
        if not head or not 0 < abs(weight) < float("inf"):
            raise ExportError(f"lora is {text!r}: accepted is PATH_OR_ID[:WEIGHT] with a weight other than 0")
        return Lora(head, weight)

    def where(self) -> tuple[str, dict[str, Any]]:
        """The arguments for diffusers."""
        path = Path(self.source)
        if path.is_file():
            return str(path.parent), {"weight_name": path.name, "local_files_only": True}
        if path.is_dir():
            return self.source, {"local_files_only": True}
        if path.is_absolute() or path.suffix == ".safetensors" and len(path.parts) < 3:
            raise ExportError(f"lora {self.source} does not exist: accepted are a file, a folder and a hub id")
        parts = self.source.split("/")
        return "/".join(parts[:2]), {"weight_name": "/".join(parts[2:])} if len(parts) > 2 else {}

    @property
    def name(self) -> str:
        """Its name in the card, without any path of this machine."""
        return Path(self.source).name if Path(self.source).exists() else self.source


def merge(pipe: Any, lora: Lora) -> int:
    """Merge the LoRA into the pipeline's transformer, in place; returns the number of changed layers.

    Raises:
        ExportError: it does not exist, is for another model, or has keys for which the transformer has no layer.
    """
    if not hasattr(type(pipe), "lora_state_dict"):
        raise ExportError(f"a {type(pipe).__name__} does not support LoRA")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ExportError(
            f"the LoRA {lora.name} cannot be merged into a model of two experts, each of which has LoRAs of its own: "
            "accepted is a pipeline into which diffusers has fused them (pipe.fuse_lora, pipe.save_pretrained)"
        )
    where, options = lora.where()
    try:
        with _quiet():
            state, *_ = type(pipe).lora_state_dict(where, return_alphas=True, **options), None
    except Exception as error:  # each style has a reader of its own, which raises what it likes
        raise ExportError(f"the LoRA {lora.name} cannot be read: {_reason(error)}") from error
    layers = check(pipe.transformer, state[0] if isinstance(state, tuple) else state, lora.name)
    with _quiet():
        try:
            pipe.load_lora_weights(where, adapter_name="merged", **options)
            pipe.fuse_lora(components=["transformer"], lora_scale=lora.weight, adapter_names=["merged"])
            pipe.unload_lora_weights()
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ExportError(
                f"the LoRA {lora.name} does not fit the {type(pipe).__name__}: {_reason(error)}"
            ) from error
    return layers


def check(transformer: nn.Module, state: Mapping[str, Tensor], name: str) -> int:
    """The number of layers that a LoRA's state changes; diffusers itself ignores keys that it does not know.

    Raises:
        ExportError: a key has no layer, one of another size, no counterpart of its rank, or values that are not
            finite; the message names one.
    """
    modules = dict(transformer.named_modules())
    layers = set()
    for key in sorted(state):
        if "alpha" in key.rpartition(".")[2]:
            continue
        layer, found, factor = key.removeprefix(PREFIX).partition(".lora_")
        if not key.startswith(PREFIX) or not found:
            raise ExportError(f"the LoRA {name} has the key {key}: accepted are changes of the transformer's layers")
        module = modules.get(layer)
        if module is None or not hasattr(module, "weight"):
            raise ExportError(f"the LoRA {name} has the key {key}, but the model has no layer {layer}")
        side = state[key].shape[1] if factor.startswith("A") else state[key].shape[0]
        own = module.weight.shape[1] if factor.startswith("A") else module.weight.shape[0]
        if side != own:
            raise ExportError(f"the LoRA {name} is for another model: {key} has size {side} where this one has {own}")
        if not state[key].isfinite().all():
            raise ExportError(f"the LoRA {name} is broken: {key} has infinite values, or some that are no numbers")
        layers.add(layer)
    if not layers:
        raise ExportError(f"the LoRA {name} changes no layer of the transformer")
    _check_ranks(state, name)
    return len(layers)


def _check_ranks(state: Mapping[str, Tensor], name: str) -> None:
    for key in sorted(key for key in state if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in state:
            raise ExportError(f"the LoRA {name} has the key {key}, but no {other}")
        ranks = state[key].shape[0], state[other].shape[1]
        if ranks[0] != ranks[1]:
            raise ExportError(f"the LoRA {name} is broken: {key} has rank {ranks[0]}, and {other} has {ranks[1]}")


def _reason(error: Exception) -> str:
    """The error in one line: diffusers names the keys below its first."""
    return shorten(str(error), LONGEST) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    level = diffusers_log.get_verbosity()
    diffusers_log.set_verbosity(logging.CRITICAL)  # what it logs as an error it raises too
    try:
        yield
    finally:
        diffusers_log.set_verbosity(level)
