"""The files of a job's pictures: encoded, signed and put into the store of results."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from service.queue.job import Claimed, Job
from service.results.store import ResultStore
from service.worker.batch import Maker
from service.worker.pictures import file_of, preview_of
from service.worker.provenance import Provenance
from service.worker.signing import ImageSigner
from student.runtimes.runtime import FloatArray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A picture's file, and when it was begun and there (``time.perf_counter``)."""

    file: str
    sha256: str
    begun_s: float
    stored_s: float

    def record(self) -> dict[str, str]:
        """Its entries in the job's result."""
        return {"file": self.file, "sha256": self.sha256}


def time_of(files: Iterable[StoredFile | None]) -> float:
    """Seconds from the beginning of the first to the end of the last: side by side they take less than their sum."""
    new = [file for file in files if file is not None]
    return max(file.stored_s for file in new) - min(file.begun_s for file in new) if new else 0.0


class PictureFiles:
    """Writes and removes the files of jobs; may be called from several threads."""

    def __init__(self, store: ResultStore, *, provenance: bool, signer: ImageSigner | None) -> None:
        self._store = store
        self._provenance = provenance
        self._signer = signer

    def store(self, maker: Maker, claimed: Claimed, job: Job, index: int, image: FloatArray) -> StoredFile:
        """Encode, sign and store picture ``index`` of a job (CHW; a video FCHW).

        Raises:
            SigningError, OSError: it cannot be signed or stored.
        """
        started = time.perf_counter()
        data = file_of(job, image, self._made_by(maker))
        if self._signer is not None:
            data = self._signer.sign(data, job.output_format, maker.origin)
        reference = self._store.put(job.id, claimed.token, str(index), job.output_format, data)
        return StoredFile(reference, hashlib.sha256(data).hexdigest(), started, time.perf_counter())

    def store_preview(
        self, maker: Maker, claimed: Claimed, job: Job, number: int, index: int, image_CHW: FloatArray
    ) -> str:
        """The reference of preview ``number`` of the unfinished image ``index``.

        Raises:
            OSError: it cannot be stored.
        """
        suffix, data = preview_of(job, image_CHW, self._made_by(maker))
        return self._store.put(job.id, claimed.token, f"p{number}-{index}", suffix, data)

    def discard(self, claimed: Claimed) -> None:
        """Remove what a claim has stored; what cannot be removed now is swept away later."""
        try:
            self._store.discard(claimed.id, claimed.token)
        except OSError as error:
            log.warning("what job %s has stored is left to the sweeper: %s", claimed.id, error)

    def _made_by(self, maker: Maker) -> Provenance | None:
        return maker.origin if self._provenance else None
