"""How much drawn work may wait: bounds at their edges."""

from __future__ import annotations

import threading

import pytest

from service.worker.backlog import Backlog


@pytest.mark.parametrize(
    ("held", "offered", "room"),
    [
        ([], 101, True),  # the first one always has room
        ([60], 40, True),
        ([60], 41, False),
        ([0, 0], 0, True),
        ([0, 0, 0], 0, False),
    ],
)
def test_there_is_room_up_to_so_many_bytes_and_batches(held: list[int], offered: int, room: bool) -> None:
    backlog = Backlog(most_bytes=100, most_batches=3)
    for num_bytes in held:
        backlog.add(num_bytes)
    assert backlog.offer(offered) is room
    backlog.remove(held[0] if held else offered)
    assert backlog.offer(0) is True, "what has ended makes room"


def test_what_was_refused_takes_no_room_and_what_was_taken_on_does() -> None:
    backlog = Backlog(most_bytes=100, most_batches=3)
    assert backlog.offer(60) and not backlog.offer(41) and backlog.offer(40) and not backlog.offer(1)
    backlog.remove(60)
    assert backlog.offer(60) and not backlog.wait_until_empty(0)
    backlog.remove(60)
    backlog.remove(40)
    assert backlog.wait_until_empty(0)


def test_whoever_draws_waits_for_room_unless_it_cannot() -> None:
    backlog = Backlog(most_bytes=100, most_batches=1)
    backlog.add(1)
    backlog.add(1, wait=False)
    waiting = threading.Thread(target=backlog.add, args=(1,), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    backlog.remove(1)
    waiting.join(0.05)
    assert waiting.is_alive(), "one is still there"
    backlog.remove(1)
    waiting.join(10)
    assert not waiting.is_alive() and not backlog.wait_until_empty(0.01)
