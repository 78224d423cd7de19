"""A file is there whole or not at all: on the disk before it takes the place of the former one, hidden until then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from student import writing
from student.writing import write_atomically


def test_the_bytes_are_on_the_disk_before_they_take_the_place_of_the_former_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "student.json"
    target.write_bytes(b"former")
    synced: list[tuple[bytes, list[str]]] = []

    def fsync(number: int) -> None:
        (unfinished,) = (path for path in tmp_path.iterdir() if path != target)
        assert unfinished.stat().st_ino == os.fstat(number).st_ino
        assert unfinished.read_bytes() == b"new", "what is in the program's own buffer is not written"
        synced.append((target.read_bytes(), sorted(path.name for path in tmp_path.glob("[!.]*"))))

    monkeypatch.setattr(writing.os, "fsync", fsync)
    write_atomically(target, b"new")
    assert synced == [(b"former", ["student.json"])], "who lists the folder meanwhile sees one whole file"
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("student.json", b"new")]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"former")

    def full(number: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"former")]
