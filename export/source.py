"""A published pipeline on disk: the weights of each part, and the reason if it cannot be adopted.

Nothing is loaded here: only the headers of weight files are read.
"""

from __future__ import annotations

import importlib
import json
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from export.errors import ExportError
from student.families.find import FAMILIES
from student.pipeline import read_index

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
MULTISTEP = "UniPCMultistepScheduler"  # Wan as published
LFS = b"version https://git-lfs.github.com/spec/"
BASES = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call their weights
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")  # of a tokenizer
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack")
FILES = (*PICKLED, ".safetensors", ".gguf", ".onnx", ".json")  # a hub id may have a dot: FLUX.1-schnell
VARIANTS = ("", "bf16", "fp16")  # the first that is there is taken


@dataclass(frozen=True)
class Weights:
    """The files of one part's weights, and their index if they are sharded."""

    files: tuple[Path, ...]
    index: Path | None = None
    variant: str = ""

    @property
    def bytes(self) -> int:
        """Their size on disk."""
        return sum(file.stat().st_size for file in self.files)

    def plain_names(self) -> dict[Path, str]:
        """Each weight file's name without the variant."""
        return {file: self._plain(file.name) for file in self.files}

    def plain_index(self) -> tuple[str, dict[str, Any]] | None:
        """Name and content of the index with these names; None if the weights are in one file."""
        if self.index is None:
            return None
        data: dict[str, Any] = json.loads(self.index.read_text("utf-8"))
        data["weight_map"] = {key: self._plain(name) for key, name in data["weight_map"].items()}
        return self._plain(self.index.name), data

    def _plain(self, name: str) -> str:
        return name.replace(f".{self.variant}", "", 1) if self.variant else name


@dataclass(frozen=True)
class Source:
    """A pipeline: its name, its folder, its index and the weights of each part.

    ``base``: for a single file, the pipeline that provides everything but the transformer.
    """

    name: str
    folder: Path
    index: Mapping[str, Any]
    weights: Mapping[str, Weights]
    base: str = ""

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Library and class of each part that is not None."""
        return {
            name: (str(value[0]), str(value[1]))
            for name, value in self.index.items()
            if isinstance(value, list) and value != [None, None]
        }


def find_source(model: str, given: Collection[str] = ()) -> Source:
    """The pipeline of a folder or hub id (from the hub's cache, or downloaded); the weights of the parts in ``given``
    may be missing.

    Raises:
        ExportError: there is none, it is not of a supported kind, or files are missing; one sentence.
        BundleError: as ``read_index``.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.suffix in FILES or folder.is_absolute() or model.startswith("."):
            raise ExportError(f"{model} does not exist: accepted are a folder, a .safetensors file and a hub id")
        folder = _download(model)
    return inspect(folder, Path(model).resolve().name if Path(model).is_dir() else model, given)


def check_download(model: str, index: Mapping[str, Any]) -> None:
    """Refuse a download that does not fit on the disk of the hub's cache; without a network its size is unknown.

    Raises:
        ExportError: it does not fit; the message says how much is needed and how much is free.
    """
    try:
        listed = HfApi().model_info(model, files_metadata=True).siblings or ()
    except (OSError, HfHubHTTPError):
        return
    sizes = {one.rfilename: one.size or 0 for one in listed}
    missing = [name for name in _chosen(sizes, index) if not isinstance(try_to_load_from_cache(model, name), str)]
    needed = sum(sizes[name] for name in missing)
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ExportError(
            f"{model} is a download of {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {HF_HUB_CACHE}: "
            f"choose another place with HF_HOME"
        )


def _chosen(names: Collection[str], index: Mapping[str, Any]) -> list[str]:
    """The weight files that ``_download`` fetches: for each part the plain ones, else bf16, else fp16."""
    found = []
    for part in (name for name, value in index.items() if isinstance(value, list)):
        weights = [name for name in names if name.startswith(f"{part}/") and name.endswith(".safetensors")]
        plain = [name for name in weights if not any(f".{variant}" in name for variant in VARIANTS if variant)]
        variants = ([name for name in weights if f".{variant}" in name] for variant in VARIANTS if variant)
        found += plain or next((chosen for chosen in variants if chosen), [])
    return found


def _download(model: str) -> Path:
    """The hub's pipeline in its cache; if there are weights in several types, the plain ones, else bf16, else fp16."""
    index = read_index(model, local_files_only=False)
    if str(index.get("_class_name")) in FAMILIES:
        check_download(model, index)
    reason = ""
    for variant in VARIANTS:
        try:
            found = DiffusionPipeline.download(model, variant=variant or None, use_safetensors=True)
            return Path(found)
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = reason or str(error).strip().splitlines()[0]
    raise ExportError(f"{model} cannot be downloaded: {reason}")


def inspect(folder: Path, name: str, given: Collection[str] = ()) -> Source:
    """The pipeline in a folder; see ``find_source`` for the errors."""
    index = read_index(folder)
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise ExportError(f"{name} is a {kind}: supported are {', '.join(FAMILIES)}")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if is_pointer(file):
            raise ExportError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in {folder}")
    found = Source(name, folder, index, {})
    if missing := [part for part in _required(kind) if part not in found.parts]:
        raise ExportError(f"{name} has no {missing[0]}, which a {kind} needs")
    weights = {part: find_weights(folder, part) for part, _ in _networks(found) if part not in given}
    for part, (_, kind) in found.parts.items():
        if part not in weights and not (folder / part).is_dir():
            raise ExportError(f"{name} lacks the folder {part!r} ({kind}) that its model_index.json names")
        if "Tokenizer" in kind and not any((folder / part / file).is_file() for file in VOCABULARIES):
            raise ExportError(f"{folder / part} has no tokenizer file: accepted are {', '.join(VOCABULARIES)}")
    return Source(name, folder, index, weights)


def _required(kind: str) -> tuple[str, ...]:
    """What a pipeline of this kind cannot do without; the third encoder of Stable Diffusion 3 is optional."""
    encoders = FAMILIES[kind].encoders[:2]
    tokenizers = (encoder.replace("text_encoder", "tokenizer") for encoder in encoders)
    return ("transformer", "vae", "scheduler", *encoders, *tokenizers)


def _networks(source: Source) -> Iterator[tuple[str, type]]:
    """The parts that have weights."""
    for part, (library, kind) in source.parts.items():
        found = class_of(library, kind, source.name)
        if issubclass(found, torch.nn.Module):
            yield part, found


def class_of(library: str, kind: str, name: str) -> type:
    """The class of a part; raises ExportError if the installed libraries do not have it."""
    try:
        module = diffusers if library == "diffusers" else importlib.import_module(library)
        found: type = getattr(module, kind)
        return found
    except (ImportError, AttributeError) as error:
        raise ExportError(f"{name} needs {library}.{kind}, which the installed {library} does not have") from error


def find_weights(folder: Path, part: str) -> Weights:
    """The weights of a part, in whichever variant they are saved.

    Raises:
        ExportError: there are none, there are only pickles, or a shard is missing or incomplete.
    """
    place = folder / part
    if not place.is_dir():
        raise ExportError(f"{folder} lacks the folder {part!r} that its model_index.json names")
    for variant in (*VARIANTS, *_other_variants(place)):
        dotted = f".{variant}" if variant else ""
        for base in BASES:
            single, index = place / f"{base}{dotted}.safetensors", place / f"{base}.safetensors.index{dotted}.json"
            if index.is_file():
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
                return _whole(Weights(tuple(place / name for name in names), index, variant))
            if single.is_file():
                return _whole(Weights((single,), None, variant))
    if broken := next((path for path in sorted(place.iterdir()) if path.is_symlink() and not path.exists()), None):
        raise ExportError(f"{broken} is a link to a file that does not exist: download the model again")
    pickled = [path.name for path in sorted(place.iterdir()) if path.suffix in PICKLED]
    if pickled:
        raise ExportError(f"{place} has its weights only as pickles ({pickled[0]}): accepted are safetensors")
    raise ExportError(f"{place} has no weights: accepted is {BASES[0]}.safetensors or {BASES[1]}.safetensors")


def _other_variants(place: Path) -> list[str]:
    names = [path.name.removesuffix(".safetensors").split(".") for path in sorted(place.glob("*.*.safetensors"))]
    return [parts[1] for parts in names if parts[0] in BASES and parts[1] not in VARIANTS]


def _whole(weights: Weights) -> Weights:
    for file in weights.files:
        if not file.is_file():
            assert weights.index is not None
            raise ExportError(f"{file} is missing, although {weights.index.name} names it")
        header(file)
    return weights


def header(file: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and offsets of each tensor in a safetensors file; the tensors are not read.

    Raises:
        ExportError: it is not such a file, or it is incomplete.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            rows: dict[str, dict[str, Any]] = json.loads(opened.read(length))
    except (struct.error, ValueError, MemoryError) as error:
        raise ExportError(f"{file} is not a safetensors file, or is incomplete: {error}") from error
    rows.pop("__metadata__", None)
    end = max((row["data_offsets"][1] for row in rows.values()), default=0)
    if 8 + length + end > file.stat().st_size:
        raise ExportError(f"{file} is incomplete: its last {8 + length + end - file.stat().st_size} bytes are missing")
    return rows


def is_pointer(file: Path) -> bool:
    """Whether the file is a Git LFS pointer."""
    if file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def hollow_pipeline(source: Source) -> Any:
    """The pipeline with networks on ``meta``: everything but the weights, for which no memory is allocated.

    Raises:
        ExportError: a part's files cannot be read; the message names the part.
    """
    parts: dict[str, Any] = {name: None for name, value in source.index.items() if value == [None, None]}
    parts |= {name: value for name, value in source.index.items() if not name.startswith("_") and name not in parts}
    for name, (library, kind) in source.parts.items():
        try:
            parts[name] = _hollow(class_of(library, kind, source.name), source.folder / name)
        except ExportError:
            raise
        except Exception as error:  # transformers and diffusers raise what they like for a file that is not theirs
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{source.folder / name} cannot be opened as a {kind}: {first}") from error
    return getattr(diffusers, str(source.index["_class_name"]))(**parts)


def _hollow(kind: Any, folder: Path) -> Any:
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder)
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
