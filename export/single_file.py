"""A checkpoint in a single file, in its authors' own names or in diffusers': a transformer, and whatever else.

The file says neither its sizes nor what belongs to it, so that another pipeline's folder does: its configurations,
tokenizers, text encoders and autoencoder are taken, and of the file the transformer alone. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.errors import ExportError
from export.source import Source, Weights, find_source, header, is_pointer

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
            raise ExportError(f"--config goes with a single .safetensors file, but {model} is not one")
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
        raise ExportError(f"{base.name} has two transformers, but a single file has only one: adopt it as a folder")
    return replace(base, name=file.name, base=base.name, weights={**base.weights, PART: Weights((file,))})


def _check_numbers(file: Path) -> None:
    kinds = {str(row["dtype"]) for row in header(file).values()} & QUANTISED
    if kinds:
        raise ExportError(f"{file} has its weights as {', '.join(sorted(kinds))}: accepted are BF16, F16 and F32")


def open_checkpoint(source: Source, hollow: nn.Module, dtype: torch.dtype) -> Any:
    """The transformer that the source's single file holds, of the class and sizes of ``hollow``.

    Raises:
        ExportError: it is another model's, or lacks weights.
    """
    (file,) = source.weights[PART].files
    refusal = f"{source.name} is not a checkpoint of {source.base}'s {type(hollow).__name__}"
    named, expected = header(file).keys(), hollow.state_dict().keys()
    if 2 * len(named & expected) > len(expected) and (missing := sorted(expected - named)):
        raise ExportError(f"{refusal}: it lacks {missing[0]}")
    if _guided(named) and not _guided(expected):  # diffusers would pass over the weights
        raise ExportError(f"{refusal}: it takes a guidance scale, and {source.base} does not")
    transformer: Any = type(hollow)
    try:
        return transformer.from_single_file(
            str(file), config=str(source.folder), subfolder=PART, local_files_only=True, dtype=dtype
        )
    except KeyError as error:
        raise ExportError(f"{refusal}: it lacks {error.args[0]}") from error
    except NotImplementedError as error:  # torch's, of weights that nothing was found for
        raise ExportError(f"{refusal}: it lacks some of its weights") from error
    except IndexError as error:  # a reader has found no layer of those that it counts
        raise ExportError(f"{refusal}: it has neither diffusers' names of its weights nor its authors'") from error
    except Exception as error:  # each model has a reader of its own, which raises what it likes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ExportError(f"{refusal}: {first}") from error


def _guided(names: Iterable[str]) -> bool:
    """Whether a FLUX transformer's weights, in its authors' names or diffusers', have an input for guidance."""
    return any(".guidance_embedder." in name or "guidance_in." in name for name in names)
