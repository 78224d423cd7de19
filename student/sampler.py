"""The one denoise loop, for serving, rollout and evaluation, on numpy or torch arrays.

Legend: B images, C latent channels, H x W latent cells, N = (H/2)(W/2) tokens of D = 4C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar


class Array(Protocol):
    """The operations that the loop needs, which numpy and torch arrays share."""

    @property
    def shape(self) -> Any: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def reshape(self, *shape: Any) -> Any: ...


A = TypeVar("A", bound=Array)


def denoise(
    velocity: Callable[[A, float], A],
    x: A,
    sigmas: Sequence[float],
    callback: Callable[[int, float, A, A], None] | None = None,
) -> A:
    """Euler steps of ``dx/dsigma = v`` from ``sigmas[0]`` through each sigma to 0: ``x + (next - sigma) v``.

    ``callback(i, sigma, x, v)`` gets the state at ``sigmas[i]`` and its velocity before the step (the predicted data
    there is ``x - sigma v``); an exception that it raises ends the loop.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        v = velocity(x, sigma)
        if callback is not None:
            callback(i, sigma, x, v)
        x = x + v * (sigma_next - sigma)
    return x


def pack(x_BCHW: A) -> A:
    """2x2 cells become one token, as FluxPipeline packs them: (B, C, H, W) -> (B, N, D)."""
    batch, channels, height, width = x_BCHW.shape
    cells = x_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2)
    tokens = _permute(cells, (0, 2, 4, 1, 3, 5)).reshape(batch, (height // 2) * (width // 2), channels * 4)
    return tokens  # type: ignore[no-any-return]


def unpack(x_BND: A, height: int, width: int) -> A:
    """The inverse of ``pack``: (B, N, D) -> (B, C, height, width), in latent cells."""
    batch, _, channels = x_BND.shape
    cells = x_BND.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return _permute(cells, (0, 3, 1, 4, 2, 5)).reshape(batch, channels // 4, height, width)  # type: ignore[no-any-return]


def _permute(x: Any, axes: tuple[int, ...]) -> Any:
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)
