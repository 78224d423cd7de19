"""A checkpoint in a single file, in its authors' own names or in diffusers': a transformer, and whatever else.

The file says neither its sizes nor what belongs to it, so that another pipeline's folder does: its configurations,
tokenizers, text encoders and autoencoder are taken, and of the file the transformer alone. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from export.errors import ExportError
from export.source import Source, Weights, class_of, find_source, header, is_pointer

PART = "transformer"
SECOND = "transformer_2"  # Wan 2.2 14B's
QUANTISED = {"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"}  # these need scales, which each author keeps otherwise


def find_model(model: str, config: str = "") -> Source:
    """A folder, a hub id, or a .safetensors file with the pipeline ``config`` that it is a checkpoint of.

    Raises:
        ExportError, BundleError: as ``find_source``; or the file cannot be taken, and why.
    """
    file = Path(model)
    if not file.is_file():
        if config:
            raise ExportError(f"--config goes with a single .safetensors file, and {model} is none")
        return find_source(model)
    if file.suffix != ".safetensors":
        raise ExportError(f"{model} is a {file.suffix or 'nameless'} file: accepted is .safetensors")
    if not config:
        raise ExportError(
            f"{model} is a single file, without a tokenizer and sizes: add --config with the folder or hub id of the "
            "pipeline that it is a checkpoint of"
        )
    if is_pointer(file):
        raise ExportError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in {file.parent}")
    _check_numbers(file)
    base = find_source(config, given=(PART,))
    if SECOND in base.parts:
        raise ExportError(f"{base.name} has two transformers, and a single file holds one: adopt it as a folder")
    return replace(base, name=file.name, base=base.name, weights={**base.weights, PART: Weights((file,))})


def _check_numbers(file: Path) -> None:
    kinds = {str(row["dtype"]) for row in header(file).values()} & QUANTISED
    if kinds:
        raise ExportError(f"{file} has its weights as {', '.join(sorted(kinds))}: accepted are BF16, F16 and F32")


def open_checkpoint(source: Source, dtype: torch.dtype) -> Any:
    """The transformer that the source's single file holds, in the sizes of its ``base``.

    Raises:
        ExportError: it is another model's, or lacks a weight; names the first.
    """
    (file,) = source.weights[PART].files
    library, kind = source.parts[PART]
    transformer: Any = class_of(library, kind, source.name)
    try:
        opened = transformer.from_single_file(
            str(file), config=str(source.folder), subfolder=PART, local_files_only=True, dtype=dtype
        )
    except Exception as error:  # each model has a reader of its own, which raises what it likes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{source.name} is no checkpoint of {source.base}'s {kind}: {first}") from error
    missing = [name for name, value in opened.state_dict().items() if value.is_meta]
    if missing:
        raise ExportError(f"{source.name} is no checkpoint of {source.base}'s {kind}: it lacks {missing[0]}")
    return opened
