"""Writes the parts of an adopted student's pipeline: weights linked, merged or converted from a single file,
configurations in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from export.lora import Lora, merge
from export.request import Say
from export.single_file import open_checkpoint
from export.source import SCHEDULER, Source, Weights, class_of, header
from export.store import link
from student.pipeline import shift_no_more


def write_pipeline(source: Source, loras: Sequence[Lora], pipe: Any, folder: Path, say: Say) -> None:
    """Write every part of the pipeline and its index; ``pipe`` holds the parts without weights."""
    shift_no_more(pipe)
    for name in source.parts:
        place = folder / name
        place.mkdir()
        if name == "transformer" and rewrites(source, loras):
            _write_transformer(source, loras, pipe, place, say)
        elif name in source.weights:
            _link_weights(source, name, place)
        else:
            part = getattr(pipe, name)
            part.save_pretrained(place)
    index = {key: value for key, value in source.index.items() if key != "_name_or_path"}
    index["scheduler"] = ["diffusers", SCHEDULER]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def rewrites(source: Source, loras: Sequence[Lora]) -> bool:
    """Whether the transformer's weights are written anew, rather than linked."""
    return bool(loras or source.base)


def _link_weights(source: Source, name: str, place: Path) -> None:
    """Link the part's weights under plain names, and write its configuration with float32, as parts are opened."""
    for file, plain in source.weights[name].plain_names().items():
        link(file.resolve(), place / plain)
    if sharded := source.weights[name].plain_index():
        (place / sharded[0]).write_text(json.dumps(sharded[1], indent=2) + "\n", "utf-8")
    for config in (source.folder / name).glob("*.json"):
        if ".index" in config.name or config.name in {path.name for path in place.iterdir()}:
            continue
        data = json.loads(config.read_text("utf-8"))
        data.pop("_name_or_path", None)
        for key in ("dtype", "torch_dtype"):
            if key in data:
                data[key] = "float32"
        (place / config.name).write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _write_transformer(source: Source, loras: Sequence[Lora], pipe: Any, place: Path, say: Say) -> None:
    pipe.register_modules(transformer=_open_transformer(source, pipe.transformer))
    if source.base:
        say(f"read {source.name} as {source.base}'s transformer")
    for lora in loras:
        layers = merge(pipe, lora)
        say(f"merged {lora.name} with weight {lora.weight:g} into {layers} layers")
    pipe.transformer.save_pretrained(place)


def _open_transformer(source: Source, hollow: Any) -> Any:
    weights = source.weights["transformer"]
    dtype = _stored_type(weights)
    if source.base:
        return open_checkpoint(source, hollow, dtype)
    options: dict[str, Any] = {"variant": weights.variant} if weights.variant else {}
    transformer: Any = class_of(*source.parts["transformer"], source.name)
    return transformer.from_pretrained(source.folder / "transformer", dtype=dtype, use_safetensors=True, **options)


def _stored_type(weights: Weights) -> torch.dtype:
    """The type of most parameters on disk."""
    counts: dict[str, int] = {}
    for file in weights.files:
        for row in header(file).values():
            first, last = row["data_offsets"]
            counts[row["dtype"]] = counts.get(row["dtype"], 0) + last - first
    most = max(counts, key=lambda name: counts[name], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)
