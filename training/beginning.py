"""The student's initial weights if they are not its teacher's: a few-step checkpoint, a student, or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from student.bundle import BundleError
from student.pipeline import open_parts
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
    pipe = open_parts(teacher if adapter else init, ("transformer", "scheduler"), dtype)
    if adapter is not None:
        _merge(pipe, adapter, init)
    own = pipe.transformer
    differing = ["its class"] if type(own) is not type(like) else _differing(own.config, like.config)
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
    try:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
        pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"student.init is {init!r}, which cannot be read as a LoRA: {error}") from error


def _differing(one: Any, other: Any) -> list[str]:
    keys = {key for key in {*one, *other} if not key.startswith("_")} - MAY_DIFFER
    return sorted(key for key in keys if json.dumps(one.get(key)) != json.dumps(other.get(key)))  # a tuple is a list
