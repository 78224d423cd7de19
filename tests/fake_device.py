"""A GPU that is not there: networks at full size on a make-believe device, whose tensors have shapes and no memory.

An operation that mixes devices raises, as on a real one; types are those that a real one would give.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "card"


@functools.cache
def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)


@contextlib.contextmanager
def fake_device() -> Iterator[FakeTensorMode]:
    """The mode in which networks that ``put`` has placed are called."""
    _register()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def put(module: nn.Module | None, mode: FakeTensorMode, dtype: torch.dtype, device: str = DEVICE) -> None:
    """Replace every parameter and buffer of a module on ``meta`` by a fake one of this type on this device."""
    if module is None:
        return
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in list(store.items()):
                if value is not None:
                    store[name] = fake(value, mode, dtype, device)  # type: ignore[index]


def fake(value: Tensor, mode: FakeTensorMode, dtype: torch.dtype, device: str = DEVICE) -> Any:
    """A fake tensor of the same shape."""
    kind = dtype if value.is_floating_point() else value.dtype
    with torch.device("meta"):
        elem = torch.empty(value.shape, dtype=kind)
    found: Any = FakeTensor(mode, elem, torch.device(device))
    return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found


def num_bytes(module: nn.Module | None) -> int:
    """Of its parameters and buffers."""
    if module is None:
        return 0
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once on the make-believe device, beside the networks' own.

    (torch's MemTracker hooks gradients, which networks that only draw have none of.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.device.type == DEVICE:
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
