"""A seed's noise: the same for ever, and no business of its batch mates."""

import numpy as np
import pytest

from student.noise import noise

SHAPE = (16, 8, 8)


def test_the_stream_is_pinned() -> None:
    """Golden values: a change of generator or of its keying would change every picture ever served."""
    first = noise([0, 1234], SHAPE)[:, 0, 0, :3]
    golden = [[0.059911035, 0.0155596342, -1.164438486], [0.6130579114, -0.5139153600, 0.2117798328]]
    np.testing.assert_array_equal(first, np.array(golden, dtype=np.float32))


def test_it_is_philox_keyed_by_the_seed() -> None:
    generator = np.random.Generator(np.random.Philox(key=77))
    np.testing.assert_array_equal(noise([77], SHAPE)[0], generator.standard_normal(SHAPE, dtype=np.float32))


def test_rows_do_not_depend_on_batch_mates_or_order() -> None:
    alone = noise([7], SHAPE)[0]
    np.testing.assert_array_equal(noise([3, 7, 9], SHAPE)[1], alone)
    np.testing.assert_array_equal(noise([7, 7], SHAPE), np.stack([alone, alone]))
    assert not np.array_equal(noise([8], SHAPE)[0], alone)


def test_it_is_standard_normal() -> None:
    """Mean and variance of 64 seeds x 1024 values, within five standard errors; neighbours do not correlate."""
    x = noise(range(64), SHAPE).reshape(64, -1)
    assert x.dtype == np.float32
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x[:-1] * x[1:]).mean()) < 5 / np.sqrt(x[1:].size)


def test_the_largest_seed_is_accepted_and_the_next_is_not() -> None:
    assert noise([2**32 - 1], SHAPE).shape == (1, *SHAPE)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed is {seed}: accepted is 0 <= seed < 2\^32"):
            noise([seed], SHAPE)


def test_an_empty_batch_is_empty() -> None:
    assert noise([], SHAPE).shape == (0, *SHAPE)
