"""Results as files of a local folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from service.results.store import ResultMissing, checked, reference_of

CLOCK = ".clock"


class FolderStore:
    """A file appears under its name when it is complete and on the disk: a job that is done must not lose it with the
    power. Ages are measured by the folder's own clock, not the caller's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: LocalFileSystem = fsspec.filesystem("file", auto_mkdir=True)

    def put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        """See ``ResultStore``."""
        reference = reference_of(job, token, name, suffix)
        path = self._folder / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync(path.parent)
        return reference

    def get(self, reference: str) -> bytes:
        """See ``ResultStore``."""
        try:
            data: bytes = self._files.cat_file(self._path(checked(reference)))
        except FileNotFoundError:
            raise ResultMissing(reference) from None
        return data

    def discard(self, job: str, token: str) -> None:
        """See ``ResultStore``."""
        folder = self._path(f"{job[:2]}/{job}/{token}")
        if self._files.exists(folder):
            self._files.rm(folder, recursive=True)

    def sweep(self, older_than_s: float, quota_bytes: int = 0) -> int:
        """See ``ResultStore``."""
        if not self._folder.exists():
            return 0
        jobs = sorted(self._jobs())
        oldest = self._now_s() - older_than_s
        excess = sum(size for _, size, _ in jobs) - quota_bytes if quota_bytes else 0
        swept = 0
        for changed_s, size, folder in jobs:
            if changed_s < oldest or excess > 0:
                with suppress(FileNotFoundError):  # somebody else sweeps too
                    self._files.rm(str(folder), recursive=True)
                    swept += 1
                excess -= size
        return swept

    def _jobs(self) -> Iterator[tuple[float, int, Path]]:
        """When each job's folder was last changed (Unix time), its size in bytes, and where it lies."""
        for folder in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                yield folder.stat().st_mtime, sum(sizes), folder

    def _now_s(self) -> float:
        clock = self._folder / CLOCK
        clock.write_bytes(b"")
        return clock.stat().st_mtime

    def _path(self, reference: str) -> str:
        return f"{self._folder}/{reference}"


def _sync(folder: Path) -> None:
    """Make what was renamed in a folder outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
