"""Stores finished stages by what they were made from, so that an export can resume and runtimes share graphs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from student.bundle import BundleError
from student.files import sha256
from student.runtimes.manifest import RUNTIMES, Graph, read_manifest

WORK = ".work"
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
# Whoever changes how a graph comes about changes one of these files, and with it every key.
TRACED = ("fused.py", "graph.py", "staged.py")
CONVERTED = (
    "narrow.py", "calibrate.py", "qdq.py", "switched.py", "quantise.py", "targets.py", "to_tensorrt.py", "engine.py",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The installed version of each library that a graph depends on."""
    return {library: version(library) for library in LIBRARIES}


def key_of(facts: object, code: Sequence[str] = TRACED) -> str:
    """sha256 of what a graph is made from: these facts, the libraries, and the exporting code."""
    here = Path(__file__).parent
    recipe = {name: sha256(here / name) for name in code}
    return hashlib.sha256(json.dumps([facts, versions(), recipe], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A graph's file, its key, and whether it already existed."""

    path: Path
    key: str
    reused: bool


class Store:
    """The graphs of one bundle: those of its finished runtimes, and those of an export in progress."""

    def __init__(self, bundle: Path, fresh: bool = False) -> None:
        self._runtimes = bundle / RUNTIMES
        self._work = self._runtimes / WORK
        if fresh:
            self.clear()
        self._finished = {} if fresh else self._read_finished()

    def find(self, key: str) -> Path | None:
        """A complete file with this key, or None."""
        path = self._work / f"{key}.onnx"
        if path.is_file() and _is_whole(path):
            return path
        folder, graph = self._finished.get(key, (None, None))
        if folder is None or graph is None or not (folder / graph.file).is_file():
            return None
        return folder / graph.file if sha256(folder / graph.file) == graph.sha256 else None

    def get(self, key: str, write: Callable[[Path], None]) -> Stored:
        """The file with this key, made by ``write`` if it does not exist."""
        if found := self.find(key):
            return Stored(found, key, reused=True)
        self._work.mkdir(parents=True, exist_ok=True)
        path = self._work / f"{key}.onnx"
        write(path)
        _seal(path)
        return Stored(path, key, reused=False)

    def clear(self) -> None:
        """Remove the graphs of an export in progress."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _read_finished(self) -> dict[str, tuple[Path, Graph]]:
        found: dict[str, tuple[Path, Graph]] = {}
        for folder in sorted(self._runtimes.glob("[!.]*")):
            with contextlib.suppress(BundleError):
                manifest = read_manifest(folder)
                graphs = (*manifest.graphs.values(), *manifest.stages.values())
                found |= {graph.key: (folder, graph) for graph in graphs if graph.key}
        return found


def link_graph(stored: Path, target: Path) -> None:
    """Link the file, and its weights if they are stored beside it, under another name; see ``link``."""
    for suffix in ("", ".data"):
        source = stored.with_name(stored.name + suffix)
        if source.is_file():
            link(source, target.with_name(source.name if suffix else target.name))


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _seal(path: Path) -> None:
    files = [path, *([data] if (data := path.with_name(f"{path.name}.data")).is_file() else [])]
    path.with_suffix(".json").write_text(json.dumps({file.name: sha256(file) for file in files}), "utf-8")


def _is_whole(path: Path) -> bool:
    seal = path.with_suffix(".json")
    if not seal.is_file():
        return False
    names: dict[str, str] = json.loads(seal.read_text("utf-8"))
    return all((path.parent / name).is_file() and sha256(path.parent / name) == value for name, value in names.items())
