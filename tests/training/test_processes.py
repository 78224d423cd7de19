"""What one of two processes makes of its own values and the other's, which a function stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training import processes
from training.processes import Processes

OTHERS = 3.0  # every number of the other process's gradients


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kinds and sizes of what is exchanged; of flags the other process has those of the second and third."""
    seen: list[tuple[str, int]] = []

    def reduce(tensor: Tensor, kind: str) -> Tensor:
        seen.append((kind, tensor.numel()))
        if kind == "mean":
            return (tensor + OTHERS) / 2
        other = torch.tensor([0.0, 1.0, 1.0, 0.0][: tensor.numel()], dtype=tensor.dtype)
        return tensor + other

    def state() -> Any:
        return SimpleNamespace(num_processes=2, process_index=1, is_main_process=False, device=torch.device("cpu"))

    monkeypatch.setattr(processes, "state", state)
    monkeypatch.setattr(processes, "reduce", reduce)
    return seen


def parameters() -> list[nn.Parameter]:
    """Two with a gradient here, one with a gradient there alone, and one with none."""
    found = [nn.Parameter(torch.zeros(size)) for size in ((2, 2), (3,), (2,), (1,))]
    found[0].grad, found[1].grad = torch.full((2, 2), 4.0), torch.tensor([2.0, 6.0, 8.0])
    return found


@pytest.mark.parametrize("limit", [1, 4 * 7, 2**20])
def test_gradients_are_means_over_micro_batches_and_processes_in_buckets_of_any_size(
    limit: int, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BUCKET_BYTES", limit)
    one, two, three, four = parameters()
    Processes().mean_gradients([one, two, three, four], 2)
    assert one.grad is not None and one.grad.tolist() == [[(4 / 2 + OTHERS) / 2] * 2] * 2
    assert two.grad is not None and two.grad.tolist() == [(value / 2 + OTHERS) / 2 for value in (2.0, 6.0, 8.0)]
    assert three.grad is None and four.grad is None, "alike: nobody is asked which"
    assert asked == ([("mean", 4), ("mean", 3)] if limit == 1 else [("mean", 7)])


def test_where_processes_may_differ_a_gradient_that_only_another_has_counts_as_zero_here(
    asked: list[tuple[str, int]],
) -> None:
    one, two, three, four = parameters()
    Processes().mean_gradients([one, two, three, four], 4, alike=False)
    assert three.grad is not None and three.grad.tolist() == [OTHERS / 2] * 2 and four.grad is None
    assert one.grad is not None and one.grad.tolist() == [[(4 / 4 + OTHERS) / 2] * 2] * 2
    assert asked == [("sum", 4), ("mean", 9)]


def test_alone_nothing_is_exchanged() -> None:
    one, two, *rest = parameters()
    Processes().mean_gradients([one, two, *rest], 2, alike=False)
    assert one.grad is not None and one.grad.tolist() == [[2.0] * 2] * 2 and rest[0].grad is None
    alone = Processes()
    assert alone.mean({"a": 1.0}) == {"a": 1.0} and alone.from_first({"a": 2.0}) == {"a": 2.0}
    assert (alone.agree(True), alone.agree(False), alone.any(True, False)) == (True, False, (True, False))
    assert (alone.size, alone.index, alone.is_first, alone.share([1, 2, 3])) == (1, 0, True, [1, 2, 3])


def test_values_are_means_votes_are_counted_and_the_first_process_decides(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Processes()
    assert here.mean({"a": 1.0, "b": -5.0}) == {"a": (1 + OTHERS) / 2, "b": (-5 + OTHERS) / 2}
    assert here.agree(True) is False and here.agree(False) is False, "the other one does not"
    assert here.any(True, False, True, False) == (True, True, True, False)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda values: [{"a": 9.0}])
    assert here.from_first({"a": 1.0}) == {"a": 9.0}
    assert (here.size, here.index, here.is_first, here.share([0, 4, 8, 12])) == (2, 1, False, [4, 12])
