"""The student's initial weights if they are not its teacher's: a few-step checkpoint, a student, or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from student.base import NETWORKS, adapter_folder
from student.bundle import BundleError
from student.families.two_experts import transformer_of
from student.pipeline import merge_adapter, open_parts
from training.config import ConfigError

ADAPTER = "pytorch_lora_weights.safetensors"
MAY_DIFFER = {"guidance_embeds"}  # FLUX.1-schnell can be trained towards FLUX.1-dev


def beginning(init: str, teacher: str, like: Any, dtype: torch.dtype) -> Any:
    """The transformer of ``init``: of a pipeline's folder or hub id, or the teacher's with a LoRA merged into it.

    ``like`` is the teacher's transformer. A LoRA is a .safetensors file, a run's ``adapter`` folder, or
    ``hub/id:file.safetensors``.

    Raises:
        BundleError: nothing that can be opened there.
        ConfigError: a transformer of another form, or a LoRA that fits nothing of it.
    """
    adapter = _adapter(init)
    pipe = open_parts(teacher if adapter else init, (*NETWORKS, "scheduler"), dtype)
    if adapter is not None:
        _merge(pipe, adapter, init)
    own = transformer_of(pipe)
    differing = ["its class"] if type(own) is not type(like) else _differing(_form(own), _form(like))
    if differing:
        raise ConfigError(
            f"student.init is {init!r}, whose transformer differs from that of {teacher} ({', '.join(differing)}): "
            "accepted is one of the same architecture"
        )
    return own


def _adapter(init: str) -> Path | None:
    path, (repository, _, file) = Path(init), init.partition(":")
    if file.endswith(".safetensors") and not path.exists():
        try:
            return Path(hf_hub_download(repository, file))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise BundleError(f"{init} cannot be opened as a file of the hub: {str(error).splitlines()[0]}") from error
    if path.is_file() and path.suffix == ".safetensors":
        return path
    return path / ADAPTER if (path / ADAPTER).is_file() else None


def _merge(pipe: Any, adapter: Path, init: str) -> None:
    is_folder, has_two = Path(init).is_dir(), getattr(pipe, NETWORKS[1], None) is not None
    named = NETWORKS if is_folder and adapter_folder(adapter.parent, NETWORKS[1]).is_dir() else NETWORKS[:1]
    if has_two and not is_folder:
        raise ConfigError(
            f"student.init is {init!r}, one file for a model of two experts: accepted is a folder with {ADAPTER} for "
            f"the first and {NETWORKS[1]}/{ADAPTER} for the second"
        )
    if len(named) > 1 and not has_two:
        raise ConfigError(f"student.init is {init!r}, an adapter of two experts: accepted is one for one transformer")
    try:
        merge_adapter(pipe, adapter.parent, adapter.name, named)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"student.init is {init!r}, which cannot be read as a LoRA: {error}") from error


def _form(network: Any) -> dict[str, Any]:
    return {**network.config, "boundary_ratio": getattr(network, "boundary", None)}


def _differing(one: Any, other: Any) -> list[str]:
    keys = {key for key in {*one, *other} if not key.startswith("_")} - MAY_DIFFER
    return sorted(key for key in keys if json.dumps(one.get(key)) != json.dumps(other.get(key)))  # a tuple is a list
