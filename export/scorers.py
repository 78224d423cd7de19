"""The scorers of a student, compiled into its bundle so that serving needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from export.errors import ExportError
from export.graph import OPSET, Signature, export_graph
from export.verify import PROMPTS, score_parity
from export.versions import versions
from export.writing import write_atomically
from rewards import shapes
from student.bundle import BundleError, Student, hash_weights, sha256
from student.runtimes.scoring import TOKENIZER, check_scorer
from student.runtimes.session import open_session
from student.tokens import PromptTokens


def is_compiled(bundle: Path, student: Student, name: str) -> bool:
    """Whether the bundle holds this scorer in the form that serving would accept."""
    try:
        check_scorer(bundle, student, name)
    except (BundleError, FileNotFoundError):
        return False
    return True


def find_scorer(student: Student, name: str, folders: Iterable[Path]) -> Path:
    """The folder NAME, in one of ``folders``, that holds the very weights that the student was calibrated with.

    Raises:
        ExportError: there is none.
    """
    tried = [folder / name for folder in folders]
    wanted = student.scorers[name].source_sha256
    for path in tried:
        if (path / "config.json").is_file() and hash_weights(path) == wanted:
            return path
    places = " or ".join(map(str, tried)) or "any folder"
    raise ExportError(f"the scorer {name!r} that {student.id} was calibrated with is not in {places}: see --scorers")


def export_scorer(bundle: Path, student: Student, name: str, source: Path) -> float:
    """Write ``scorers/NAME.onnx`` and its manifest; returns the largest difference from torch.

    Raises:
        ExportError: the compiled scorer differs from torch by more than the tolerance.
    """
    scorer = student.scorers[name]
    module = shapes.load(source)
    ids_BL = PromptTokens(bundle, student.max_tokens).encode_clip(PROMPTS)
    size = (student.image.height, student.image.width)
    inputs = {"images": torch.zeros(2, 3, *size), "token_ids": torch.from_numpy(ids_BL[:2])}
    metadata = {"scorer": name, "source_sha256": scorer.source_sha256}
    data = export_graph(module, Signature(f"scorer-{name}", inputs, ("score",)), metadata)
    path = bundle / scorer.file
    path.parent.mkdir(exist_ok=True)
    unproven = path.with_name(f".{path.name}.part")
    try:
        unproven.write_bytes(data)
        parity = score_parity(open_session(unproven, threads=1), module, scorer.std, size, ids_BL)
        manifest = {
            "source_sha256": scorer.source_sha256,
            "tokenizer_sha256": student.files[TOKENIZER],
            "sha256": sha256(unproven),
            "inputs": {"images": ["batch", 3, *size], "token_ids": ["batch", ids_BL.shape[1]]},
            "outputs": {"score": ["batch"]},
            "parity": asdict(parity),
            "opset": OPSET,
            "versions": versions(),
        }
        write_atomically(path.with_suffix(".json"), (json.dumps(manifest, indent=2) + "\n").encode())
        write_atomically(path, data)
    finally:
        unproven.unlink(missing_ok=True)
    return max(parity.max_abs.values())
