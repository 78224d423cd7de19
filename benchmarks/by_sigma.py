"""Two experts over fake tensors, which have no number to choose by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

from torch import Tensor

from student.families import two_experts
from student.families.family import Condition, Family


@contextlib.contextmanager
def by_sigma() -> Iterator[None]:
    """The expert of the sigma that a family was last asked for is called."""
    asked: list[float] = []
    velocity = Family.velocity

    def noted(self: Family, x: Tensor, sigma: float, condition: Condition) -> Tensor:
        asked[:] = [sigma]
        return velocity(self, x, sigma, condition)

    def chosen(experts: Sequence[Any], boundary: float, *inputs: Tensor) -> Tensor:
        return two_experts.called(experts[0 if asked[0] >= boundary else 1], *inputs)

    with patch.object(Family, "velocity", noted), patch.object(two_experts, "by_time", chosen):
        yield
