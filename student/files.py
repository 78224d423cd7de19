"""The files of a student bundle and their sha256, which reveal a changed or missing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from student.base import ADAPTER, BASE, read_base
from student.bundle import MANIFEST, BundleError, Student, rewrite_student


def write_student(bundle: Path, student: Student) -> Student:
    """Write ``student.json`` (atomically) beside the pipeline that it describes, with the sha256 of each file.

    Returns the student with its ``files`` filled in.
    """
    complete = replace(student, files=hash_files(bundle))
    rewrite_student(bundle, complete)
    return complete


def hash_files(bundle: Path, inside: Collection[str] = ()) -> dict[str, str]:
    """sha256 of each file that ``open_pipeline`` reads in the bundle, by path inside it.

    With ``inside``, only of the files in these folders.
    """
    index = bundle / "model_index.json"
    if not index.is_file():
        raise BundleError(f"{bundle} is not a diffusers pipeline: it has no model_index.json")
    parts = [name for name in json.loads(index.read_text("utf-8")) if not name.startswith("_")]
    named = [index]
    if (bundle / BASE).is_file():
        named, parts = [bundle / BASE, index], [ADAPTER, *parts]
    wanted = [bundle / name for name in parts if not inside or name in inside]
    found = sorted(path for part in wanted for path in part.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): sha256(path) for path in ([] if inside else named) + found}


def verify_files(bundle: Path, student: Student, inside: Collection[str] = ()) -> None:
    """Compare the bundle's files with the hashes in its manifest: all of them and its base's, or those ``inside`` some
    folders.

    Raises:
        BundleError: a file is missing, changed, or unknown to the manifest; the message names the first.
    """
    found = hash_files(bundle, inside)
    for name, expected in student.files.items():
        if inside and name.partition("/")[0] not in inside:
            continue
        if name not in found:
            raise BundleError(f"{bundle}/{name} is missing, but {MANIFEST} names it")
        if found[name] != expected:
            raise BundleError(f"{bundle}/{name} has changed since {MANIFEST} was written (sha256 differs)")
    for name in found:
        if name not in student.files:
            raise BundleError(f"{bundle}/{name} is not named in {MANIFEST}")
    if not inside:
        _verify_base(bundle)


def _verify_base(bundle: Path) -> None:
    base = read_base(bundle)
    if base is None:
        return
    folder = base.folder()
    for name, expected in base.files.items():
        if not (folder / name).is_file():
            raise BundleError(f"{folder}/{name} is missing, but {bundle}/{BASE} names it")
        if sha256(folder / name) != expected:
            raise BundleError(f"{folder}/{name} is not what {bundle} was trained on (sha256 differs)")


def hash_weights(folder: Path) -> str:
    """One sha256 for the weights and the configuration in a model's folder; cards and pictures do not count."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    if not files:
        raise BundleError(f"{folder} holds no weights")
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
