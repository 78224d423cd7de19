"""Signs of reward hacking in a run's log: each is one sentence, and none of them stops the run.

A row of the log is one step; only some rows have validation figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student.writing import write_atomically
from training.disk import unless_full

Row = dict[str, float]
WINDOW = 3  # validations that a trend is read from
DIVERSITY_KEPT, VELOCITY_DRIFT, SATURATION_RISE = 0.9, 1.25, 0.1


def alarms(log: Sequence[Row], reward_p999: float) -> list[str]:
    """The alarms at the last validation in ``log``; the first validation is the run's start.

    ``reward_p999`` is the 99.9th percentile of the teacher's standardised reward on the calibration prompts.
    """
    seen = [row for row in log if "heldout_validation" in row]
    if len(seen) < 2:
        return []
    first, last = seen[0], seen[-1]
    found = [_diverging(seen[-WINDOW:])]
    if last["diversity_validation"] < DIVERSITY_KEPT * first["diversity_validation"]:
        kept = last["diversity_validation"] / first["diversity_validation"]
        found.append(f"diversity fell to {kept:.0%} of its value at the start")
    if last["reward_validation"] > reward_p999:
        found.append(f"the mean reward {last['reward_validation']:.2f} is above the teacher's 99.9th percentile")
    if last["velocity_norm"] > VELOCITY_DRIFT * first["velocity_norm"]:
        found.append(f"the velocity norm is {last['velocity_norm'] / first['velocity_norm']:.2f} times the start's")
    if last["saturation"] > first["saturation"] + SATURATION_RISE:
        found.append(
            f"{last['saturation']:.0%} of all pixel values are saturated (at the start {first['saturation']:.0%})"
        )
    return [sentence for sentence in found if sentence]


def all_alarms(log: Sequence[Row], reward_p999: float) -> list[tuple[int, str]]:
    """The alarms of every validation in ``log``, each with the number of steps done by then."""
    validations = [i for i, row in enumerate(log) if "heldout_validation" in row]
    return [(int(log[i]["step"]) + 1, alarm) for i in validations for alarm in alarms(log[: i + 1], reward_p999)]


def write_alarms(path: Path, log: Sequence[Row], reward_p999: float) -> list[str]:
    """Write the alarms of every validation in ``log`` to a file; those of its last row, as they stand there."""
    found = all_alarms(log, reward_p999)
    with unless_full("its alarms", path):
        write_atomically(path, "".join(f"step {at}: {alarm}\n" for at, alarm in found).encode())
    return [f"step {at}: {alarm}" for at, alarm in found if log and at == int(log[-1]["step"]) + 1]


def _diverging(rows: Sequence[Row]) -> str:
    """The held-out score falls while the trained one rises, over ``WINDOW`` validations."""
    if len(rows) < WINDOW:
        return ""
    heldout = rows[-1]["heldout_validation"] - rows[0]["heldout_validation"]
    trained = rows[-1]["reward_validation"] - rows[0]["reward_validation"]
    if heldout < 0 < trained:
        return f"the held-out score fell by {-heldout:.3f} while the trained one rose by {trained:.3f}"
    return ""
