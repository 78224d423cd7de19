"""How many images share a call, against what each choice would cost by hand; and what the device says of its load."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from service.worker import device as device_file
from service.worker.batch_size import BUSY, Load, call_s, sizes
from service.worker.device import SHAPES, Device, Shape

MOST = 8
SHAPE: Shape = ("m", "1", 64, 64, 0, 4)
FLAT, HALF, STEADY = (lambda b: 0.1 * b), (lambda b: 0.05 + 0.05 * b), (lambda b: 0.1)


def load(seconds: Callable[[int], float], rate: float = 0.0, left: float = 1.0) -> Load:
    return Load(rate, left, {images: seconds(images) for images in range(1, MOST + 1)})


def answered_s(waiting: int, images: int, seconds: Callable[[int], float]) -> float:
    """The mean time until an answer, call by call."""
    now, total = 0.0, 0.0
    while waiting:
        now += seconds(min(images, waiting))
        total += now * min(images, waiting)
        waiting -= min(images, waiting)
    return total


@pytest.mark.parametrize("seconds", [FLAT, HALF, STEADY, lambda b: 0.1 * math.ceil(b / 4)])
def test_at_rest_a_call_takes_as_few_as_are_answered_soonest(seconds: Callable[[int], float]) -> None:
    found = sizes(load(seconds), MOST)
    assert len(found) == MOST + 1
    for waiting, images in enumerate(found[:MOST], 1):
        others = [answered_s(waiting, other, seconds) for other in range(1, waiting + 1)]
        assert images <= waiting and answered_s(waiting, images, seconds) == pytest.approx(min(others))


def test_where_a_batch_gains_nothing_images_are_drawn_one_by_one_and_where_it_is_free_all_at_once() -> None:
    assert sizes(load(FLAT), MOST) == (1,) * (MOST + 1)
    assert sizes(load(STEADY), MOST) == (1, 2, 3, 4, 5, 6, 7, 8, 8)


def test_more_than_a_full_batch_that_waits_is_drawn_as_fast_as_can_be() -> None:
    """Calls of 4 have the highest throughput here: 4 images in 0.2 s."""
    times = {1: 0.1, 2: 0.15, 4: 0.2, 8: 0.5}
    assert sizes(Load(0.0, 1.0, times), MOST)[-1] == 4


@pytest.mark.parametrize(
    ("rate", "left", "least"),
    [
        (BUSY / 0.1 * 0.99, 1.0, 1),  # ten a second one by one, of which 70 %
        (BUSY / 0.1 * 1.01, 1.0, 2),  # two in 0.15 s: 13.3 a second
        (BUSY / 0.075 * 1.01, 1.0, 3),  # three in 0.2 s
        (1000.0, 1.0, 8),  # nothing keeps up
        (BUSY / 0.1 * 0.99 / 2, 1 - BUSY / 2, 1),  # other shapes take half of the 70 %
        (BUSY / 0.1 * 1.01 / 2, 1 - BUSY / 2, 2),
    ],
)
def test_under_load_a_call_takes_as_many_as_keep_up(rate: float, left: float, least: int) -> None:
    found = sizes(load(HALF, rate, left), MOST)
    assert found == tuple(max(least, at_rest) for at_rest in sizes(load(HALF), MOST))


def test_sizes_that_were_never_drawn_lie_on_the_line_of_their_neighbours() -> None:
    known = {2: 0.3, 6: 0.7}
    found = [call_s(known, images) for images in (1, 2, 3, 4, 6, 7, 8)]
    assert found == pytest.approx([0.3, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9])
    assert [call_s({2: 0.3, 3: 0.2}, images) for images in (3, 5)] == [0.2, 0.2], "no call is hoped to take less"
    assert sizes(Load(0.0, 1.0, {}), MOST) == (), "nothing is known: the queue's own bound holds"
    assert sizes(Load(0.0, 1.0, {1: 0.1}), MOST)[MOST - 1] == MOST, "so a full batch is tried at once"
    assert sizes(Load(0.0, 1.0, {8: 0.8}), MOST)[:3] == (1, 2, 3), "a small one is drawn when no more wait"


def test_the_load_is_what_was_drawn_lately() -> None:
    now = [0.0]
    device = Device(lambda: now[0])
    other: Shape = ("m", "1", 64, 64, 0, 2)
    for k in range(200):
        now[0] += 0.5
        device.measured(SHAPE, 1 if k < 100 else 4, 0.1 if k < 100 else 0.2)
        device.measured(other, 1, 0.1)
    ours, theirs = device.loads()[SHAPE], device.loads()[other]
    old = (1 - 1 / device_file.MEMORY_CALLS) ** 100  # what a hundred calls have left of all before
    assert ours.rate == pytest.approx((1 - old) * 8 + old * 2, rel=1e-3) and theirs.rate == pytest.approx(2, rel=1e-3)
    assert (ours.left, theirs.left) == pytest.approx((0.8, 0.6 + old * 0.2), abs=1e-3)
    assert ours.calls_s == pytest.approx({1: 0.1, 4: 0.2})
    now[0] += 10.0  # as long again as twenty calls took
    assert device.loads()[SHAPE].rate == pytest.approx(4, rel=0.01)
    device.measured(SHAPE, 1, 0.1)
    kept = 1 - 1 / device_file.MEMORY_CALLS
    assert device.loads()[SHAPE].rate == pytest.approx((kept * 80 + 1) / (kept * 10 + device_file.MEMORY_S), rel=0.01)


@pytest.mark.parametrize("seconds", [0.01, 1.0])
def test_an_idle_hour_is_forgotten_as_soon_as_any_other_load(seconds: float) -> None:
    now = [0.0]
    device = Device(lambda: now[0])
    device.measured(SHAPE, 1, seconds)
    now[0] += 3600
    calls = round(5 * max(device_file.MEMORY_CALLS, device_file.MEMORY_S / seconds))
    for _ in range(calls):
        now[0] += seconds
        device.measured(SHAPE, 1, seconds)
    assert device.loads()[SHAPE].rate * seconds == pytest.approx(1.0, abs=0.05)


def test_many_short_calls_are_remembered_for_seconds() -> None:
    now = [0.0]
    device = Device(lambda: now[0])
    for _ in range(2000):
        now[0] += 0.01
        device.measured(SHAPE, 1, 0.005)
    for _ in range(100):
        now[0] += 0.01
        device.measured(SHAPE, 3, 0.005)
    old = math.exp(-1 / device_file.MEMORY_S)
    assert device.loads()[SHAPE].rate == pytest.approx((1 - old) * 300 + old * 100, rel=0.01)


def test_a_size_that_was_not_drawn_for_long_is_tried_again_and_what_is_sent_stays_small() -> None:
    now = [0.0]
    device = Device(lambda: now[0])
    device.measured(SHAPE, 8, 9.0)  # with a compilation, say
    for k in range(device_file.FORGOTTEN_CALLS):
        assert set(device.loads()[SHAPE].calls_s) == ({1, 8} if k else {8})
        device.measured(SHAPE, 1, 0.1)
    assert set(device.loads()[SHAPE].calls_s) == {1}
    device.measured(SHAPE, 8, 0.2)
    assert device.loads()[SHAPE].calls_s == pytest.approx({1: 0.1, 8: 0.2}), "nothing is left of the nine seconds"
    for steps in range(SHAPES):
        now[0] += 1
        device.measured(("m", "1", 64, 64, 0, 100 + steps), 1, 0.1)
    assert len(device.loads()) == SHAPES and SHAPE not in device.loads()


def test_what_lies_between_two_calls_is_a_part_of_each() -> None:
    """0.02 s pass between calls of 0.1 s, for which work waits; then it is idle, and the next work is begun at once."""
    now = [0.0]
    device = Device(lambda: now[0])
    for _ in range(100):
        now[0] += 0.02
        device.begin(SHAPE, 2, waiting_since=0.0)
        now[0] += 0.1
        device.measured(SHAPE, 2, 0.1)
        device.end()
    found = device.loads()[SHAPE]
    assert found.calls_s == pytest.approx({2: 0.12}) and found.rate == pytest.approx(2 / 0.12, rel=0.01)
    other: Shape = ("m", "1", 64, 64, 0, 2)
    device.measured(other, 1, 0.1)
    assert device.loads()[other].left == pytest.approx(0.0, abs=0.01), "gaps are time that others do not have either"
    for _ in range(100):
        now[0] += 5.0
        device.begin(SHAPE, 2, waiting_since=now[0])
        now[0] += 0.1
        device.measured(SHAPE, 2, 0.1)
        device.end()
    assert device.loads()[SHAPE].calls_s == pytest.approx({2: 0.1})
    assert device.predicted_s(SHAPE, 2) == pytest.approx(0.1), "when the device is free has nothing to do with it"
