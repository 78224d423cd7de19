"""Inspects a pipeline's files before any is opened: finds variants, and names files that could not be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from student.bundle import BundleError

BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs"
POINTER_BYTES = 1024  # a pointer is smaller
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# model.safetensors, model-00001-of-00002.safetensors; with a variant model.fp16.safetensors, model.fp16-00001-of-...,
# and as older versions named shards, model-00001-of-00002.fp16.safetensors.
WEIGHTS = re.compile(r"[\w-]+?(?:-\d{5}-of-\d{5})?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
PREFERRED = ("bf16", "fp16")


def variant_of(source: str | Path, index: Mapping[str, Any], local_files_only: bool = True) -> str | None:
    """The variant (``fp16``) to open, if some part of a pipeline has its weights in no other form."""
    names = _names(source, local_files_only)
    only: set[str] = set()
    for part in components(index):
        found = {WEIGHTS.fullmatch(name.partition("/")[2]) for name in names if name.startswith(f"{part}/")}
        variants = {match["variant"] for match in found if match}
        if variants and None not in variants:
            only |= variants
    return next((name for name in (*PREFERRED, *sorted(only)) if name in only), None)


def _names(source: str | Path, local_files_only: bool) -> Sequence[str]:
    """The paths of a folder's or hub id's files; empty if the hub cannot be reached (opening it will say why)."""
    folder = Path(source)
    try:
        if not folder.is_dir() and not local_files_only:
            return list_repo_files(str(source))
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), local_files_only=True, allow_patterns=["model_index.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
        return ()
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]


def components(index: Mapping[str, Any]) -> Iterable[str]:
    """The parts of a pipeline that are not None, each a folder."""
    return [name for name, value in index.items() if _is_component(value)]


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value != [None, None]


def check_index(path: Path) -> None:
    """Raises BundleError for a model_index.json (or other configuration) that is not plain JSON."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise BundleError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if start.startswith(BOM):
        raise BundleError(f"{path} begins with a byte order mark: accepted is UTF-8 without one")


def check_files(folder: Path, index: Mapping[str, Any], given: Iterable[str] = ()) -> None:
    """Inspect a folder's parts, except for those that are ``given`` from elsewhere.

    Raises:
        BundleError: one is missing, incomplete, or has weights that are not safetensors; the message names the file.
    """
    for part in set(components(index)) - set(given):
        if not (folder / part).is_dir():
            raise BundleError(f"{folder} has no folder {part}, although its model_index.json names it")
        files = sorted(path for path in (folder / part).iterdir() if path.is_file())
        for path in files:
            if path.suffix == ".json" or path.stat().st_size < POINTER_BYTES:
                check_index(path)
        pickled = [path for path in files if path.suffix in PICKLED]
        if pickled and not any(path.suffix == ".safetensors" for path in files):
            raise BundleError(
                f"{pickled[0]} is a pickle, which may run code as it is read: accepted are weights as safetensors "
                "(`save_pretrained` writes them)"
            )
