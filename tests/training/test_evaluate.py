"""Figures with known answers."""

import math
from pathlib import Path

import numpy as np
import pytest

from training.evaluate import Evaluation, cached, mean_error, paired, vendi


def test_vendi_counts_the_different_ones() -> None:
    assert vendi(np.ones((8, 3))) == pytest.approx(1.0)
    assert vendi(np.eye(8)) == pytest.approx(8.0)
    assert vendi(np.repeat(np.eye(4), 2, axis=0)) == pytest.approx(4.0)


def test_mean_and_standard_error() -> None:
    mean, error = mean_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))


def test_a_paired_difference_forgets_what_both_share() -> None:
    hard = [10.0, -20.0, 7.0, 3.0]
    assert paired([x + 1 for x in hard], hard) == (1.0, 0.0)


def test_an_evaluation_is_measured_once(tmp_path: Path) -> None:
    made = []

    def make() -> Evaluation:
        made.append(1)
        return Evaluation("teacher", 50, 1.5, {"trained": [0.5]}, {"right": [1.0]}, [2.0])

    assert cached(tmp_path, "key", make) == cached(tmp_path, "key", make)
    assert len(made) == 1
    cached(tmp_path, "another", make)
    assert len(made) == 2
