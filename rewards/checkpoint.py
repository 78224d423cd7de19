"""Published checkpoints as plain tensors: a pickle is read once, without running its code, and kept as safetensors."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rewards.files import Published, locate
from rewards.interface import RewardError

M = TypeVar("M", bound=PreTrainedModel)
State = dict[str, Tensor]


def tensors(published: Published, files: Path, inside: str = "") -> State:
    """The tensors of a published .pt or .pth, by their published names.

    ``inside`` names the entry that holds them, if they are not at the top level. They are kept as safetensors in the
    published model's folder below ``files``; the pickle may then be deleted, and is read again only if it changes.

    Raises:
        RewardError: no file, or one that is not a checkpoint of plain tensors.
    """
    original = published.folder(files) / published.names[0]
    kept = original.with_suffix(".safetensors")
    if kept.is_file() and (not original.is_file() or _origin(kept) == _stamp(original)):
        return _read_kept(kept)
    found = locate(published, files) / original.name
    state = _unpickle(found, inside)
    keep(state, kept, _stamp(found))
    return state


def keep(state: State, path: Path, origin: str) -> None:
    """Write ``state`` to ``path`` atomically.

    Raises:
        RewardError: the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, part, {"origin": origin})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RewardError(f"{path} cannot be written: {error}") from error


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"


def _origin(kept: Path) -> str:
    try:
        with safe_open(kept, "pt") as file:
            origin: str = (file.metadata() or {}).get("origin", "")
            return origin
    except SafetensorError:
        return ""


def _read_kept(kept: Path) -> State:
    try:
        return load_file(kept)
    except SafetensorError as error:
        raise RewardError(f"{kept} is not a valid safetensors file ({error}): delete it and try again") from error


def _unpickle(path: Path, inside: str) -> State:
    try:
        loaded = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RewardError(f"{path} is incomplete or not a checkpoint of plain tensors: download it again") from error
    state: Any = loaded.get(inside) if inside and isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise RewardError(f"{path} holds no {inside or 'state'!r}: it is not the published checkpoint")
    # Copies, since safetensors takes neither views nor tensors that share their memory.
    return {name: value.detach().clone().contiguous() for name, value in state.items() if isinstance(value, Tensor)}


def fill(kind: type[M], config: PreTrainedConfig, state: State, source: str, **arguments: Any) -> M:
    """A transformers model of ``kind`` with exactly these weights, in fp32.

    Raises:
        RewardError: a weight is missing, unknown or of another shape; ``source`` names the checkpoint.
    """
    with torch.device("meta"):
        expected = kind(config, **arguments).state_dict()
    check_names(expected, state, source)
    model: M = kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.float32, **arguments)
    return model


def check_names(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Require the same names and shapes.

    Raises:
        RewardError: they differ; the message names the first that does.
    """
    for name in sorted(expected.keys() ^ state.keys()):
        raise RewardError(f"{source}: {name} is {'missing' if name in expected else 'unknown'}")
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise RewardError(f"{source}: {name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}")
