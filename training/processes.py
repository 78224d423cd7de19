"""The processes of one training run: alone, or started by ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from student.families.family import sent

# The first process alone writes the bundle, 34 GB of FLUX, while the others wait; NCCL by itself waits for ten minutes.
LONGEST_WAIT = timedelta(hours=1)
BUCKET_BYTES = 100 * 2**20  # of gradients that are averaged in one call: a thousand small ones are latency alone


def state() -> PartialState:
    """This process's place among the others; without a GPU they communicate through gloo, which must be requested."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)


@contextmanager
def process_group() -> Iterator[None]:
    """Close the process group at the end, once all processes have arrived.

    A process that exits with its group still open may abort after all its work is done: a gloo thread releases the last
    message while the interpreter shuts down (pytorch/pytorch#190489; 5 of 12 starts of four processes on two cores). A
    process that fails closes nothing: NCCL would wait for the others, which the launcher ends.
    """
    yield
    if torch.distributed.is_initialized():
        state().wait_for_everyone()
        state().destroy_process_group()


class Processes:
    """This process's rank, and the values that all processes agree on."""

    def __init__(self) -> None:
        self._state = state()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self._state.num_processes)

    @property
    def index(self) -> int:
        """This one's place among them."""
        return int(self._state.process_index)

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files."""
        return bool(self._state.is_main_process)

    def share(self, parts: Sequence[int]) -> list[int]:
        """This process's part of ``parts``; every process gets equally many."""
        return list(parts)[self._state.process_index :: self.size]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's mean over the processes."""
        if self.size == 1:
            return dict(values)
        stacked = self._sent(list(values.values()))
        return dict(zip(values, reduce(stacked, "mean").tolist(), strict=True))

    def agree(self, here: bool) -> bool:
        """Whether ``here`` is true in every process."""
        if self.size == 1:
            return here
        return bool(reduce(self._sent([here]), "sum") == self.size)

    def from_first(self, values: Mapping[str, float]) -> dict[str, float]:
        """The first process's values: those that a decision depends on must not differ in the last bit."""
        kept = [dict(values)]
        return dict(broadcast_object_list(kept)[0]) if self.size > 1 else kept[0]

    def mean_gradients(self, parameters: Sequence[nn.Parameter], micro_batches: int, alike: bool = True) -> None:
        """Average every gradient over the processes' micro-batches; FSDP2 has already averaged sharded ones.

        ``alike``: every process has gradients of the same parameters, so that nobody has to ask which.
        """
        if self.size > 1 and not alike:
            self._fill([p for p in parameters if not isinstance(p, DTensor)])
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient /= micro_batches
        if self.size > 1:
            for bucket in buckets([g for g in gradients if not isinstance(g, DTensor)], BUCKET_BYTES):
                flat = reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    def _fill(self, parameters: Sequence[nn.Parameter]) -> None:
        """Zeros where only other processes have a gradient: of two experts they may have called another one."""
        if not parameters:
            return
        here = self._sent([p.grad is not None for p in parameters])
        for parameter, num in zip(parameters, reduce(here, "sum").tolist(), strict=True):
            if num and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def any(self, *here: bool) -> tuple[bool, ...]:
        """Whether each of ``here`` is true in at least one process."""
        if self.size == 1:
            return here
        return tuple(num > 0 for num in reduce(self._sent(here), "sum").tolist())

    def _sent(self, values: Sequence[float]) -> Tensor:
        """Numbers where the processes exchange them: NCCL moves what lies on a GPU, and nothing else."""
        return sent(torch.tensor(values, dtype=torch.float64), self._state.device)

    def wait(self) -> None:
        """Wait until every process has arrived."""
        self._state.wait_for_everyone()


def buckets(tensors: Sequence[Tensor], limit_bytes: int) -> list[list[Tensor]]:
    """The tensors in order, in groups of one type and device and at most about ``limit_bytes``."""
    found: list[list[Tensor]] = []
    for tensor in tensors:
        last = found[-1] if found else []
        alike = bool(last) and (last[0].dtype, last[0].device) == (tensor.dtype, tensor.device)
        if alike and sum(one.nbytes for one in last) + tensor.nbytes <= limit_bytes:
            last.append(tensor)
        else:
            found.append([tensor])
    return found


def kind_of(device: torch.device | str) -> str:
    """What numbers depend on of a device: its kind, not which of several it is."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
