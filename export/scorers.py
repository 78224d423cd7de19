"""Compiles a student's scorers into its bundle, so that serving needs no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from export.errors import ExportError
from export.graph import OPSET, Signature, save, trace
from export.store import versions
from export.verify import BATCHES, FP32, PROMPTS, difference
from rewards.interface import Reward, RewardError
from rewards.registry import find
from rewards.tokenized import load
from rewards.twostage import PromptTokenizer, TwoStage
from student.bundle import BundleError, Student
from student.files import hash_weights, sha256
from student.runtimes.manifest import Parity
from student.runtimes.resize import matrices
from student.runtimes.scoring import (
    COLUMNS,
    FORMAT,
    IDS,
    IMAGES,
    MASK,
    ROWS,
    CompiledScorer,
    check_scorer,
    served,
    tokenizer_of,
)  # fmt: skip
from student.runtimes.sizes import Size
from student.writing import write_atomically

EXAMPLE = (40, 48)  # the traced picture's height and width: neither the other's, nor the scorer's side


def is_compiled(bundle: Path, student: Student, name: str) -> bool:
    """Whether the bundle has this scorer in a form that serving accepts."""
    try:
        check_scorer(bundle, student, name)
    except (BundleError, FileNotFoundError):
        return False
    return True


def open_scorer(bundle: Path, student: Student, name: str, folders: Iterable[Path]) -> Reward:
    """The scorer in torch: by its reward's name or, for the starter world, from the folder with its weights.

    Raises:
        ExportError: there is none.
    """
    try:
        if reward := student.scorers[name].reward:
            return find(reward)
        return load(find_scorer(student, name, folders), bundle / "tokenizer")
    except RewardError as error:
        raise ExportError(f"the scorer {name!r} cannot be opened: {error}") from error


def find_scorer(student: Student, name: str, folders: Iterable[Path]) -> Path:
    """The folder NAME, in one of ``folders``, with exactly the weights that the student was calibrated with.

    Raises:
        ExportError: there is none.
    """
    tried = [folder / name for folder in folders]
    wanted = student.scorers[name].source_sha256
    for path in tried:
        if (path / "config.json").is_file() and hash_weights(path) == wanted:
            return path
    places = " or ".join(map(str, tried)) or "any folder"
    raise ExportError(
        f"the scorer {name!r} that {student.id} was calibrated with is not in {places}: give its folder with --scorers"
    )


class Judge(nn.Module):
    """A scorer with its preprocessing for served pictures: rounded to bytes, as in its authors' code."""

    def __init__(self, reward: TwoStage) -> None:
        super().__init__()
        self.reward, self.preprocess = reward, replace(reward.preprocess, in_bytes=True)

    def forward(
        self, images: Tensor, rows: Tensor, columns: Tensor, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Raw scores (B,)."""
        words = [part for part in (ids, mask) if part is not None]
        return self.reward.judge(self.preprocess.resampled(images, rows, columns), *words).float()


def export_scorer(
    path: Path, reward: TwoStage, source_sha256: str, sizes: Sequence[Size], std: float | None = None
) -> float:
    """Write a scorer's graph to ``path``, with its tokenizer and manifest; returns the largest difference from torch.

    ``sizes`` are those of the pictures that it is verified with; differences are in units of ``std``, the standard
    deviation of its scores (None: of those in the proof).

    Raises:
        ExportError: it has no ONNX form, or differs from torch by more than the tolerance; then nothing is written.
    """
    work = path.with_name(f".{path.stem}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        made = work / path.name
        inputs = _trace(reward, made, source_sha256)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "source_sha256": source_sha256,
            "sha256": sha256(made),
            "data_sha256": sha256(data) if (data := work / f"{path.name}.data").is_file() else "",
            "tokenizer_sha256": sha256(words) if (words := tokenizer_of(made)).is_file() else "",
            "inputs": inputs,
            "fit": reward.preprocess.fit,
            "side": reward.preprocess.size,
            "opset": OPSET,
            "versions": versions(),
        }
        write_atomically(made.with_suffix(".json"), json.dumps(manifest).encode())
        parity = prove_scorer(CompiledScorer(made, 1), reward, sizes, std)
        manifest["parity"] = asdict(parity)
        write_atomically(made.with_suffix(".json"), (json.dumps(manifest, indent=2) + "\n").encode())
        for file in sorted(
            work.iterdir(), key=lambda file: file == made
        ):  # the graph itself last: with it, all is there
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return max(parity.max_abs.values())


def _trace(reward: TwoStage, path: Path, source_sha256: str) -> list[str]:
    """Write graph and tokenizer; returns the names of the graph's inputs."""
    rows, columns = (
        torch.from_numpy(part) for part in matrices(reward.preprocess.fit, reward.preprocess.size, *EXAMPLE)
    )
    inputs = {IMAGES: torch.zeros(2, 3, *EXAMPLE), ROWS: rows, COLUMNS: columns}
    dims = {IMAGES: {2: "height", 3: "width"}, ROWS: {1: "height"}, COLUMNS: {0: "width"}}
    if reward.words is not None:
        tokenizer = write_tokenizer(reward.words, tokenizer_of(path))
        encodings = tokenizer.encode_batch(["a", "b c"])
        inputs[IDS] = torch.tensor([row.ids for row in encodings])
        if reward.words.masked:
            inputs[MASK] = torch.tensor([row.attention_mask for row in encodings])
    signature = Signature(f"scorer-{path.stem}", inputs, ("score",), dims, not_batched=(ROWS, COLUMNS))
    save(trace(Judge(reward), signature, {"scorer": path.stem, "source_sha256": source_sha256}), path)
    return list(inputs)


def write_tokenizer(words: PromptTokenizer, path: Path) -> Tokenizer:
    """The tokenizer as one file that the tokenizers library reads, with length and padding in it.

    Raises:
        ExportError: it is not one of that library's.
    """
    backend = getattr(words.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"its tokenizer is a {type(words.tokenizer).__name__}: accepted are fast tokenizers")
    tokenizer = Tokenizer.from_str(backend.to_str())
    pad_id = words.tokenizer.pad_token_id if words.pad_id is None else words.pad_id
    tokenizer.enable_truncation(words.length)
    tokenizer.enable_padding(length=words.length, pad_id=pad_id, pad_token=str(tokenizer.id_to_token(pad_id)))
    tokenizer.save(str(path))
    return tokenizer


def prove_scorer(compiled: CompiledScorer, reward: TwoStage, sizes: Sequence[Size], std: float | None = None) -> Parity:
    """Compare a compiled scorer with torch, each with its own tokenizer, at every size.

    Both resize by the same matrices (which tests compare with torch's own): resized bytes fall on halves so often that
    a different last bit would change whole bytes.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    worst: dict[int, float] = {}
    seen: list[Any] = []
    judge = Judge(reward)
    for size in (*sizes, EXAMPLE):
        images_BCHW = _pictures(len(PROMPTS), size)
        rows, columns = (
            torch.from_numpy(part) for part in matrices(reward.preprocess.fit, reward.preprocess.size, *size)
        )
        for batch in BATCHES:
            images, prompts = images_BCHW[:batch], PROMPTS[:batch]
            words = reward.words.read(prompts) if reward.words else ()
            with torch.inference_mode():
                theirs = judge(torch.from_numpy(images), rows, columns, *words).numpy()
            seen.append(theirs)
            worst[batch] = max(worst.get(batch, 0.0), difference(compiled(images, prompts), theirs))
    scale = std or max(float(np.concatenate(seen).std()), 1e-6)
    found = Parity({batch: value / scale for batch, value in worst.items()}, FP32.score)
    if not max(found.max_abs.values()) <= found.tolerance:
        figures = ", ".join(f"{value:.2g} at batch {batch}" for batch, value in found.max_abs.items())
        raise ExportError(
            f"the standardised scores differ from torch by {figures}: accepted is {found.tolerance:g}; "
            "nothing was written"
        )
    return found


def _pictures(count: int, size: Size) -> Any:
    """Noise in blocks of 1 to 8 pixels, rounded to bytes."""
    gen = np.random.default_rng(0)
    rows = []
    for b in range(count):
        block = 1 + b % 8
        cells = gen.random((3, -(-size[0] // block), -(-size[1] // block)), dtype=np.float32)
        rows.append(cells.repeat(block, 1).repeat(block, 2)[:, : size[0], : size[1]])
    return served(np.stack(rows))
