"""The result store: complete files or none, one for each claim, and an end to all of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from service.results.folder import FolderStore
from service.results.store import ResultMissing

JOB = "ab" + "0" * 30


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "the results")


def test_what_is_put_is_got(store: FolderStore, tmp_path: Path) -> None:
    reference = store.put(JOB, "17", "2", "png", b"bytes")
    assert reference == f"ab/{JOB}/17/2.png" and store.get(reference) == b"bytes"
    assert [path.name for path in (tmp_path / "the results").rglob("*") if path.is_file()] == ["2.png"]


def test_two_claims_of_a_job_do_not_share_a_file(store: FolderStore) -> None:
    first, second = store.put(JOB, "1", "0", "png", b"zombie"), store.put(JOB, "2", "0", "png", b"heir")
    store.discard(JOB, "1")
    store.discard(JOB, "1")
    assert store.get(second) == b"heir"
    with pytest.raises(ResultMissing):
        store.get(first)


def test_a_file_that_is_being_written_is_not_there_yet(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("the machine has stopped")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="stopped"):
        store.put(JOB, "1", "0", "png", b"bytes")
    with pytest.raises(ResultMissing):
        store.get(f"ab/{JOB}/1/0.png")


def test_an_image_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_job_ends(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power loss leaves is what was synced: the bytes, then the rename, then the folder that holds it."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("folder" if path.is_dir() else f"{path.stat().st_size} bytes")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    store.put(JOB, "1", "0", "png", b"bytes")
    assert done == ["5 bytes", "name", "folder"]


@pytest.mark.parametrize("reference", ["../../etc/passwd", f"ab/{JOB}/1/../../../x.png", "", f"ab/{JOB}/1/0.png/.."])
def test_nothing_outside_the_store_can_be_named(store: FolderStore, reference: str) -> None:
    with pytest.raises(ResultMissing):
        store.get(reference)
    with pytest.raises(ValueError, match="not a reference"):
        store.put("../" + JOB, "1", "0", "png", b"")


def test_a_file_that_lies_beside_the_results_is_not_read(store: FolderStore, tmp_path: Path) -> None:
    reference = store.put(JOB, "1", "0", "png", b"bytes")
    for secret in (tmp_path / "x.png", tmp_path / "the results" / "x.png"):
        secret.write_bytes(b"secret")
    for outside in ("../x.png", "x.png", f"ab/{JOB}/1/../../../x.png", f"ab/{JOB}/1/../../../../x.png"):
        with pytest.raises(ResultMissing):
            store.get(outside)
    assert store.get(reference) == b"bytes"


def test_old_jobs_are_swept_and_young_ones_are_not(store: FolderStore, tmp_path: Path) -> None:
    old, young = "cd" + "1" * 30, "ef" + "2" * 30
    references = [store.put(job, "1", "0", "png", b"bytes") for job in (old, young)]
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "the results" / "cd" / old, (an_hour_ago, an_hour_ago))
    assert store.sweep(1800) == 1 and store.sweep(1800) == 0
    assert store.get(references[1]) == b"bytes"
    with pytest.raises(ResultMissing):
        store.get(references[0])


def test_an_empty_store_can_be_swept(store: FolderStore) -> None:
    assert store.sweep(0) == 0
