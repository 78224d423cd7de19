"""How long files took that are written side by side."""

from __future__ import annotations

from service.worker.files import StoredFile, time_of


def file(begun_s: float, stored_s: float) -> StoredFile:
    return StoredFile("reference", "hash", begun_s, stored_s)


def test_files_take_from_the_first_beginning_to_the_last_end() -> None:
    assert time_of([file(2.0, 2.5), None, file(1.0, 2.25), file(1.5, 4.0)]) == 3.0
    assert time_of([file(1.0, 1.25)]) == 0.25


def test_without_a_new_file_no_time_has_passed() -> None:
    assert time_of([None]) == time_of([]) == 0.0
