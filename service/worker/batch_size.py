"""How many of the images that wait share the next call: pure rules, from measured times and the load.

A call answers all its images when it ends. Where a call of two takes twice as long as one of one image, as on most CPUs
and for large networks, a batch only keeps its first image waiting; where it takes little longer, a batch is the
throughput. So a call takes as few images as keep up with the load, but no fewer than bring what waits now soonest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

BUSY = 0.7  # the share of its time that a device may be busy in batches that are smaller than the fastest


@dataclass(frozen=True)
class Load:
    """What a worker draws of one shape: ``rate`` in images a second, the share of its time that other shapes leave, and
    the seconds of a call by its number of images, where they are known."""

    rate: float
    left: float
    calls_s: Mapping[int, float]


def call_s(calls_s: Mapping[int, float], images: int) -> float:
    """The time of a call, on the line through the two known sizes that are nearest.

    Where one size alone is known, all take as long: larger ones are tried, and smaller ones come by themselves, when no
    more wait.
    """
    sizes = sorted(calls_s)
    if images <= sizes[0] or len(sizes) == 1:
        return calls_s[sizes[0]]
    at = min(max(1, bisect_left(sizes, images)), len(sizes) - 1)
    low, high = sizes[at - 1], sizes[at]
    slope_s = (calls_s[high] - calls_s[low]) / (high - low)
    return (
        calls_s[low] + slope_s * (images - low)
        if images < high
        else calls_s[high] + max(0.0, slope_s) * (images - high)
    )


def sizes(load: Load, most: int) -> tuple[int, ...]:
    """The images of the next call when 1, 2, ... wait; the last value holds for any more. Empty: nothing is known."""
    if not load.calls_s:
        return ()
    known_s = tuple(call_s(load.calls_s, images) for images in range(1, most + 1))
    least = _keeps_up(load, known_s)
    return tuple(max(least, images) for images in _by_waiting(known_s))


@lru_cache(maxsize=256)  # between two claims the load has changed, and the times of one shape at most
def _by_waiting(calls_s: tuple[float, ...]) -> tuple[int, ...]:
    """As few as are answered soonest, up to a full batch; where more wait, the throughput alone counts."""
    return (*(_soonest(waiting, calls_s) for waiting in range(1, len(calls_s) + 1)), _fastest(calls_s))


def _keeps_up(load: Load, calls_s: Sequence[float]) -> int:
    """The smallest batch that keeps the device no busier than ``BUSY``; the fastest one if none does."""
    for images, seconds in enumerate(calls_s, 1):
        if load.rate * seconds / images <= BUSY - (1 - load.left):
            return images
    return _fastest(calls_s)


def _fastest(calls_s: Sequence[float]) -> int:
    """The smallest of the batches with the highest throughput, of which a hundredth is not worth a larger one."""
    rates = [images / seconds for images, seconds in enumerate(calls_s, 1)]
    return next(images for images, rate in enumerate(rates, 1) if rate >= 0.99 * max(rates))


def _soonest(waiting: int, calls_s: Sequence[float]) -> int:
    """The batch in which ``waiting`` images, drawn one call after the other, are answered soonest in the mean."""
    return min(range(1, min(waiting, len(calls_s)) + 1), key=lambda images: _total_s(waiting, images, calls_s))


def _total_s(waiting: int, images: int, calls_s: Sequence[float]) -> float:
    """The sum of the times until each is answered: in full calls, and then one of the rest."""
    full, rest = divmod(waiting, images)
    in_full_s = images * calls_s[images - 1] * full * (full + 1) / 2
    return in_full_s + (rest * (full * calls_s[images - 1] + calls_s[rest - 1]) if rest else 0.0)
