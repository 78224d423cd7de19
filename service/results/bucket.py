"""Results as objects of an S3-compatible store, through fsspec. Credentials and endpoint are AWS' own variables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import fsspec  # type: ignore[import-untyped]

from service.errors import StartupError
from service.results.store import ResultMissing, checked, reference_of


class BucketStore:
    """Objects below ``s3://bucket/prefix``. One appears when it is complete: a PUT is atomic.

    A lifecycle rule of the bucket may sweep in the place of the service.
    """

    def __init__(self, url: str) -> None:
        try:
            self._objects = fsspec.filesystem("s3", use_listings_cache=False)
        except ImportError:
            raise StartupError("FEWSTEP_RESULTS on S3 needs the extra s3: pip install 'fewstep[s3]'.") from None
        self._root = url.removeprefix("s3://").rstrip("/")

    def put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        """See ``ResultStore``."""
        reference = reference_of(job, token, name, suffix)
        with _as_os_errors():
            self._objects.pipe_file(self._path(reference), data)
        return reference

    def get(self, reference: str) -> bytes:
        """See ``ResultStore``."""
        path = self._path(checked(reference))
        try:
            with _as_os_errors():
                data: bytes = self._objects.cat_file(path)
        except FileNotFoundError:
            raise ResultMissing(reference) from None
        return data

    def discard(self, job: str, token: str) -> None:
        """See ``ResultStore``."""
        with _as_os_errors():
            if found := self._objects.find(self._path(f"{job[:2]}/{job}/{token}")):
                self._objects.rm(found)

    def sweep(self, older_than_s: float, quota_bytes: int = 0) -> int:
        """See ``ResultStore``."""
        now = datetime.now(UTC).timestamp()
        with _as_os_errors():
            jobs = sorted(self._jobs().values())
            excess = sum(size for _, size, _ in jobs) - quota_bytes if quota_bytes else 0
            swept = 0
            for changed_s, size, paths in jobs:
                if now - changed_s > older_than_s or excess > 0:
                    self._objects.rm(paths)
                    swept += 1
                    excess -= size
        return swept

    def _jobs(self) -> dict[str, tuple[float, int, list[str]]]:
        """By job: when its newest object was written (Unix time), the bytes of all, and their paths."""
        jobs: dict[str, tuple[float, int, list[str]]] = {}
        for path, about in self._objects.find(self._root, detail=True).items():
            job = path.removeprefix(f"{self._root}/").split("/")[1]
            changed_s, size, paths = jobs.get(job, (0.0, 0, []))
            newest_s = max(changed_s, about["LastModified"].timestamp())
            jobs[job] = (newest_s, size + int(about["size"]), [*paths, path])
        return jobs

    def _path(self, reference: str) -> str:
        return f"{self._root}/{reference}"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """botocore and aiohttp have error trees of their own for a store that is away."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the bucket failed: {type(error).__name__}") from error
