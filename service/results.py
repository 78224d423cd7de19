"""Where the pictures lie between the worker and the client: files, never the queue's server."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

REFERENCE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}/[0-9]+/(p[0-9]-)?[0-9]+\.[a-z]+")


class ResultMissing(Exception):
    """No such result: never written, or swept away."""


class ResultStore:
    """Images under ``<shard>/<job>/<token>/<k>.<format>`` of a folder, previews of them beside as ``p<i>-<k>``.

    The token is that of the claim that drew them: two workers that drew the same job never write the same file, and
    the job's record points at the winner's. A file appears under its name when it is complete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: LocalFileSystem = fsspec.filesystem("file", auto_mkdir=True)

    def put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        """Store one image; returns the reference to get it back with."""
        reference = f"{job[:2]}/{job}/{token}/{name}.{suffix}"
        if not REFERENCE.fullmatch(reference):
            raise ValueError(f"{reference!r} is no reference to a result")
        path = self._path(reference)
        unfinished = f"{path}.{uuid.uuid4().hex}.part"
        self._files.pipe_file(unfinished, data)
        self._files.mv(unfinished, path)
        return reference

    def get(self, reference: str) -> bytes:
        """The bytes of an image.

        Raises:
            ResultMissing: there is no such image (any more).
        """
        if not REFERENCE.fullmatch(reference):
            raise ResultMissing(reference)
        try:
            data: bytes = self._files.cat_file(self._path(reference))
        except FileNotFoundError:
            raise ResultMissing(reference) from None
        return data

    def discard(self, job: str, token: str) -> None:
        """Remove what one claim of a job has written, if anything."""
        folder = self._path(f"{job[:2]}/{job}/{token}")
        if self._files.exists(folder):
            self._files.rm(folder, recursive=True)

    def sweep(self, older_than_s: float) -> int:
        """Remove the jobs whose folder was last changed so long ago; returns how many."""
        oldest = time.time() - older_than_s
        swept = 0
        for folder in self._files.glob(f"{self._folder}/*/*"):
            try:
                if self._files.modified(folder).timestamp() < oldest:
                    self._files.rm(folder, recursive=True)
                    swept += 1
            except FileNotFoundError:  # somebody else sweeps too
                continue
        return swept

    def _path(self, reference: str) -> str:
        return f"{self._folder}/{reference}"
