"""How long files took that are written side by side, and what each says of who made it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.queue.job import Claimed
from service.worker.batch import maker_of
from service.worker.files import PictureFiles, StoredFile, time_of
from student.runtimes.fake import FakeRuntime
from tests.service.support import a_job


def file(begun_s: float, stored_s: float) -> StoredFile:
    return StoredFile("reference", "hash", begun_s, stored_s)


def test_files_take_from_the_first_beginning_to_the_last_end() -> None:
    assert time_of([file(2.0, 2.5), None, file(1.0, 2.25), file(1.5, 4.0)]) == 3.0
    assert time_of([file(1.0, 1.25)]) == 0.25


def test_without_a_new_file_no_time_has_passed() -> None:
    assert time_of([None]) == time_of([]) == 0.0


@pytest.mark.parametrize("provenance", [True, False])
def test_pictures_and_their_previews_say_who_made_them_unless_they_are_told_not_to(provenance: bool) -> None:
    put = dict[str, bytes]()

    def store(job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        put[f"{job} {token} {name}.{suffix}"] = data
        return name

    files = PictureFiles(SimpleNamespace(put=store), provenance=provenance, signer=None)  # type: ignore[arg-type]
    job, image_CHW = a_job(), np.zeros((3, 8, 8), np.float32)
    parts: tuple[Any, ...] = (maker_of(FakeRuntime()), Claimed("i", "17", "", 1, 0.0), job)
    assert files.store(*parts, 2, image_CHW).file == "2"
    assert files.store_preview(*parts, 1, 2, image_CHW) == "p1-2"
    assert list(put) == [f"{job.id} 17 2.png", f"{job.id} 17 p1-2.png"]
    assert [b"digitalsourcetype/trainedAlgorithmicMedia" in data for data in put.values()] == [provenance] * 2
