"""A GPU that is not there: networks at full size on a make-believe device, whose tensors have shapes and no memory.

An operation that mixes devices raises, as on a real one. Autocast casts what CUDA's casts and keeps its copies of the
weights; attention is the flash kernel where it can be. The interpreter may abort when it ends, after a gradient was
taken (torch's thread for the device has no driver): a program that uses this ends with ``os._exit``.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "card"
# What CUDA's autocast casts (ATen/autocast_mode.h), as far as the networks here use it.
NARROWED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d")
WIDENED = (
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "exp", "rsqrt", "reciprocal", "cosine_similarity"),
    *("mse_loss", "log", "upsample_nearest2d", "_upsample_nearest_exact2d", "_upsample_bicubic2d_aa", "pow", "softmax"),
    *("log_softmax", "cumsum", "prod", "linalg_vector_norm"),
)
NARROW = torch.bfloat16
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
LIBRARIES: list[torch.library.Library] = []  # what is registered lives as long as they do


@functools.cache
def _register() -> _Copies:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    torch.card.get_amp_supported_dtype = lambda: [NARROW]  # type: ignore[attr-defined]
    copies, every, aten = _Copies(), torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES.extend((every, aten))
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype in ((NARROWED, NARROW), (WIDENED, torch.float32)):
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" not in overload and "names" not in overload and "Dimname" not in overload:
                    op = getattr(packet, overload)
                    aten.impl(op.name().removeprefix("aten::"), _casting(op, dtype, copies), "AutocastPrivateUse1")
    aten.impl("scaled_dot_product_attention", functools.partial(_narrow_attention, copies), "AutocastPrivateUse1")
    return copies


class _Copies:
    """autocast's narrow copies of weights that learn, kept until the outermost autocast ends."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A float tensor in ``dtype``; everything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (dtype == NARROW and value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        found = self._kept.get(id(value))
        if found is None or found[0]() is not value:
            with torch.enable_grad():
                found = self._kept[id(value)] = (weakref.ref(value), value.to(dtype))
        return found[1]

    def clear(self) -> None:
        self._kept.clear()


def _casting(op: Any, dtype: torch.dtype, copies: _Copies) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*(copies.cast(one, dtype) for one in args), **kwargs)

    return call


def _narrow_attention(copies: _Copies, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return attention(*(copies.cast(one, NARROW) for one in (q, k, v)), *args, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` as a GPU's kernels compute it: the flash kernel in 16 bits, with a mask or in
    32 bits the memory-efficient one. Neither keeps a square of the tokens.
    """
    q, k, v = query, key, value
    if {q.dtype, k.dtype, v.dtype} != {q.dtype}:
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale
    )[0]
    return found


@contextlib.contextmanager
def fake_device() -> Iterator[FakeTensorMode]:
    """The mode in which networks that ``put`` has placed are called."""
    copies, clear = _register(), torch.clear_autocast_cache

    def clear_both() -> None:
        clear()
        copies.clear()

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        patch.object(torch, "clear_autocast_cache", clear_both),
        patch.object(nn.Module, "_apply", _apply),
        patch.object(torch, "tensor", functools.partial(_tensor, torch.tensor)),
        patch.object(torch, "as_tensor", functools.partial(_tensor, torch.as_tensor)),
    ):
        yield mode


def _tensor(make: Callable[..., Tensor], data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """In place of ``torch.tensor`` and the like, which fill memory on the device itself."""
    here = device is None or torch.device(device).type != DEVICE
    return make(data, **options) if here else _unknown(make, data, device=device, **options)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of what ``Module.to`` does, which exchanges tensors in place: fake ones cannot be exchanged."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, value in self._parameters.items():
        if value is not None:
            self._parameters[name] = nn.Parameter(fn(value.detach()), value.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """What a program reads of a fake tensor is 1: its numbers are not there."""
    with (
        patch.object(Tensor, "item", lambda _: 1.0),
        patch.object(Tensor, "__float__", lambda _: 1.0),
        patch.object(Tensor, "__int__", lambda _: 0),
        patch.object(Tensor, "__bool__", lambda _: True),
        patch.object(Tensor, "tolist", lambda self: [1.0] * len(self)),
        patch.object(Tensor, "numpy", functools.partialmethod(_numpy, Tensor.numpy)),
    ):
        yield


def _numpy(value: Tensor, read: Callable[[Tensor], Any]) -> Any:
    if not isinstance(value, FakeTensor):
        return read(value)
    if value.device.type == DEVICE:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")
    return np.ones(value.shape, np.float32)


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


def num_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


class Peak(TorchDispatchMode):
    """The bytes that are alive on a device, and the most that were since ``restart``.

    ``hold`` counts what was there before. (torch's MemTracker hooks gradients, of which frozen weights have none.)
    With more than ``limit`` bytes the device is out of memory.
    """

    def __init__(self, device: str = DEVICE, limit: int | None = None) -> None:
        super().__init__()
        self._device = device
        self._limit = limit
        self.now = self.most = 0
        self._alive: dict[int, int] = {}
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._alive:
                self._free(storage._cdata)
                self._hold(storage)

        self._resizing = patch.object(torch.UntypedStorage, "resize_", resized)  # how FSDP frees what it gathered

    def __enter__(self) -> Peak:
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.stop()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.most = self.now

    def hold(self, module: nn.Module | None) -> int:
        """Count a module's parameters and buffers; the bytes of those that were not counted before."""
        before = self.now
        for value in (*module.parameters(), *module.buffers()) if module is not None else ():
            self.count(value)
        return self.now - before

    def count(self, value: Tensor) -> None:
        """Count a tensor's memory from now until nobody holds it; of a sharded one this process's slice."""
        storage = (value._local_tensor if isinstance(value, DTensor) else value).untyped_storage()
        if value.device.type != self._device or storage._cdata in self._alive:
            return
        self._hold(storage)
        weakref.finalize(storage, self._free, storage._cdata)
        if self._limit is not None and self.now > self._limit:
            raise torch.OutOfMemoryError(f"{self.now} bytes of {self._limit}")

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again with its slices, which have memory
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.count(value)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Attention as a GPU's kernels compute it: none keeps a square of the tokens."""
    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        patch.object(torch, "as_tensor", functools.partial(_unknown, torch.as_tensor)),
        patch.object(torch, "tensor", functools.partial(_unknown, torch.tensor)),
    ):
        yield


def _unknown(make: Callable[..., Tensor], data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """A fake tensor of one number remembers it, and would compute with it on a device that cannot."""
    found = make(data, **options)
    if isinstance(found, FakeTensor):
        found.constant = None
    return found if device is None else found.to(device)
