"""Raw scores that are kept while they are measured."""

from __future__ import annotations

from pathlib import Path

from export.journal import Journal
from export.measure import _read, _row


def test_a_row_that_was_measured_again_takes_the_place_of_what_came_after_it(tmp_path: Path) -> None:
    """A second scorer that has fewer rows has both of them go on from there."""
    journal = Journal(tmp_path / "kept" / "scores.jsonl", {"source": "a"})
    first, second = (4, (64, 32)), (2, (64, 32))
    for cell, at, raw in (
        (first, 0, [0.0, 1.0]), (first, 2, [2.0, 3.0]), (second, 0, [9.0]), (first, 2, [4.0, None, 5.0]),
    ):  # fmt: skip
        journal.add(_row(cell, at, raw))
    known = Journal(tmp_path / "kept" / "scores.jsonl", {"source": "a"})
    assert _read(known, 5) == {first: [0.0, 1.0, 4.0, None, 5.0], second: [9.0]}
    assert _read(known, 3) == {first: [0.0, 1.0, 4.0], second: [9.0]}, "fewer are asked for now"
    assert _read(Journal(tmp_path / "kept" / "scores.jsonl", {"source": "b"}), 5) == {}, "of other weights"
