"""The largest batch of a size: what memory allows, what pays, and what leaves a picture's bytes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from student.runtimes.batches import FILE, Measured, independent, measure, read_table, split, write_table
from student.runtimes.runtime import FloatArray


class Device:
    """Draws a picture's own bytes in ``seconds(batch)``, with room for ``room`` and other kernels for ``other``."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1000, other: Sequence[int] = ()) -> None:
        self.seconds, self.room, self.other = seconds, room, other
        self.now = 0.0
        self.asked: list[int] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> FloatArray:
        self.asked.append(len(prompts))
        if len(prompts) > self.room:
            raise MemoryError
        self.now += self.seconds(len(prompts))
        images = np.array([hash((p, s)) % 1000 for p, s in zip(prompts, seeds, strict=True)], np.float32)
        images = images.reshape(-1, 1, 1, 1)
        return np.nextafter(images, np.float32(2e9)) if len(prompts) in self.other else images

    def measure(self) -> Measured:
        return measure(self.draw, lambda error: isinstance(error, MemoryError), clock=lambda: self.now)


def test_a_batch_grows_while_it_pays() -> None:
    found = Device(lambda batch: 1 + max(0, batch - 8) * 0.11).measure()
    assert found.largest == 16 and found.together == (1, 2, 4, 8, 16)  # 32 draw no faster than two calls of 16
    assert found.seconds[8] == pytest.approx(1) and found.seconds[32] == pytest.approx(3.64)


def test_a_large_network_is_drawn_alone() -> None:
    found = Device(lambda batch: float(batch)).measure()
    assert found.largest == 1 and found.together == (1,)


def test_memory_ends_the_growth_and_another_error_is_raised() -> None:
    found = Device(lambda batch: 1.0, room=5).measure()
    assert found.largest == 4 and found.together == (1, 2, 4)
    device = Device(lambda batch: 1.0, room=5)
    with pytest.raises(MemoryError):
        measure(device.draw, lambda error: False, clock=lambda: device.now)


def test_sizes_that_change_bytes_are_left_out_and_two_of_them_end_the_search() -> None:
    device = Device(lambda batch: 1.0, other=(2,))
    assert device.measure().together[:3] == (1, 4, 8)
    device = Device(lambda batch: 1.0 if batch == 1 else 0.8 * batch, other=(2,))
    assert device.measure().together == (1, 4), "4 pictures pay against 4 calls of 1, not against 2 of them"
    device = Device(lambda batch: 1.0, other=(2, 4))
    assert device.measure().largest == 1 and max(device.asked) == 4


def test_independence_is_bit_for_bit_and_every_size_is_tried() -> None:
    device = Device(lambda batch: 1.0, other=(3, 5))
    assert independent(device.draw, range(1, 7)) == (1, 2, 4, 6)
    assert set(device.asked) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("count", "together", "sizes"),
    [
        (5, (), [5]),
        (5, (1,), [1] * 5),
        (5, (1, 2), [2, 2, 1]),
        (8, (1, 4), [4, 4]),
        (3, (1, 4), [1, 1, 1]),
        (0, (1,), []),
    ],
)
def test_a_batch_is_split_into_sizes_that_may_go_together(
    count: int, together: tuple[int, ...], sizes: list[int]
) -> None:
    parts = split(count, together)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(count)[part]] == list(range(count))


def test_a_table_is_kept_for_each_machine_and_a_broken_one_is_measured_again(tmp_path: Path) -> None:
    rows = {"64x64": Measured({1: 0.5, 2: 0.6}, (1, 2), 2)}
    write_table(tmp_path / "runtimes", "a", rows)
    write_table(tmp_path / "runtimes", "b", {})
    assert read_table(tmp_path / "runtimes", "a") == rows and read_table(tmp_path / "runtimes", "c") == {}
    (tmp_path / "runtimes" / FILE).write_text('{"a": {"64x64": 1}}')
    assert read_table(tmp_path / "runtimes", "a") == {}
    write_table(tmp_path / "runtimes", "a", rows)
    assert read_table(tmp_path / "runtimes", "a") == rows
    assert [path.name for path in (tmp_path / "runtimes").iterdir()] == [FILE]


def test_a_twentieth_more_is_what_twice_the_pictures_must_be_faster() -> None:
    for second, largest in ((2 / 1.05 - 1e-6, 2), (2 / 1.05 + 1e-6, 1)):
        found = Device(lambda batch, second=second: {1: 1.0, 2: second}.get(batch, 1e9)).measure()  # type: ignore[misc]
        assert found.largest == largest and found.together == (1, 2)[:largest]


def test_a_bundle_that_cannot_be_written_keeps_no_table_and_says_nothing(tmp_path: Path) -> None:
    rows = {"64x64": Measured({1: 0.5}, (1,), 1)}
    write_table(tmp_path / "not" / "there", "a", rows)
    (tmp_path / "file").touch()
    write_table(tmp_path / "file", "a", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and read_table(tmp_path / "file", "a") == {}


def test_the_tables_of_other_machines_stay_and_what_is_no_table_is_written_over(tmp_path: Path) -> None:
    first, second = ({size: Measured({1: 0.5, 4: 0.75}, (1, 4), 4)} for size in ("64x64", "96x32"))
    for before in ("", "[1]", "{"):
        (tmp_path / FILE).write_text(before)
        write_table(tmp_path, "a", first)
        write_table(tmp_path, "b", second)
        write_table(tmp_path, "a", second)
        assert (read_table(tmp_path, "a"), read_table(tmp_path, "b")) == (second, second)


def test_two_processes_that_write_at_once_never_mix_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes a file of its own, hidden from those that list the runtimes, and puts it in the table's place."""
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: names.append(self.name) or replace(self, target))
    for process in (7, 8):
        monkeypatch.setattr("student.runtimes.batches.os.getpid", lambda process=process: process)
        write_table(tmp_path, "a", {})
    assert len(set(names)) == 2 and all(name.startswith(".") for name in names)


def test_a_size_is_independent_only_if_every_picture_of_it_is(tmp_path: Path) -> None:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> FloatArray:
        images = np.array(seeds, np.float32).reshape(-1, 1, 1, 1)
        if len(seeds) == 3:
            images[2] = np.nextafter(images[2], np.float32(9))
        return images

    assert independent(draw, (1, 2, 3)) == (1, 2) == independent(draw, (2, 3))
    assert measure(draw, lambda error: False, (1, 2, 3), clock=lambda: 0.0).together == (1, 2)
