"""Students for the fake runtime that lie on disk like real ones: manifest, hashes, weights of any size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from student.bundle import Student
from student.files import write_student
from student.runtimes.fake import fake_image, fake_student
from student.runtimes.runtime import FloatArray


def make_student(folder: Path, id: str, version: str, size_bytes: int = 1000, dim: float = 1.0) -> Student:
    """``folder/id/version``, a whole bundle of zeros; where its pictures are dimmed, its scorers see it."""
    bundle = folder / id / version
    (bundle / "transformer").mkdir(parents=True)
    (bundle / "transformer" / "weights.safetensors").write_bytes(bytes(size_bytes))
    (bundle / "model_index.json").write_text(json.dumps({"_class_name": "Fake", "transformer": ["fake", "Fake"]}))
    return write_student(
        bundle, replace(fake_student(), id=id, version=version, baked={"dim": dim} if dim != 1 else {})
    )


def drawn_by(id: str, version: str, prompt: str, seed: int, steps: int = 4) -> FloatArray:
    """The answer key: no other student draws this picture."""
    return fake_image(prompt, seed, steps, f"{id}/{version}/")
