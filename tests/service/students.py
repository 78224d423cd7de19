"""Students for the fake runtime that lie on disk like real ones: manifest, hashes, weights of any size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from student.bundle import Student
from student.files import sha256, write_student
from student.runtimes.fake import fake_image, fake_student
from student.runtimes.manifest import MANIFEST
from student.runtimes.runtime import FloatArray

STARTER = Path(__file__).resolve().parents[2] / "models" / "shapes"


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


def copy_starter(models: Path, version: str) -> Path:
    """The shipped student as a version of its own, ``models/shapes/VERSION``; returns the bundle."""
    bundle, unfinished = models / "shapes" / version, models / f".{version}"
    shutil.copytree(STARTER, unfinished, ignore=shutil.ignore_patterns("run", "*.png"))
    manifest = json.loads((unfinished / "student.json").read_text())
    (unfinished / "student.json").write_text(json.dumps({**manifest, "version": version}))
    bundle.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(bundle)
    return bundle


def change_engine(bundle: Path, change: Callable[[FloatArray], FloatArray]) -> None:
    """Change the largest weight of a compiled student's network, which is whole to every check at its loading: its
    manifest has the hash of the changed file."""
    import onnx

    folder = next((bundle / "runtimes").glob("onnx-*"))
    manifest = json.loads((folder / MANIFEST).read_text())
    graph = stages["step"] if (stages := manifest["stages"]) else manifest["graphs"][_fewest(manifest)]
    model = onnx.load(folder / graph["file"])
    largest = max(model.graph.initializer, key=lambda one: len(one.raw_data) if one.data_type == 1 else 0)
    largest.raw_data = change(np.frombuffer(largest.raw_data, np.float32).copy()).astype(np.float32).tobytes()
    (folder / graph["file"]).unlink()
    onnx.save(model, folder / graph["file"])
    graph["sha256"] = sha256(folder / graph["file"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _fewest(manifest: dict[str, dict[str, object]]) -> str:
    return str(min(map(int, manifest["graphs"])))


def change_one_weight(values: FloatArray) -> FloatArray:
    """By a hundredth, in the middle."""
    values[len(values) // 2] += np.float32(0.01)
    return values
