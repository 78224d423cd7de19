"""When a sampler looks at the picture: the one place that computes sigmas (1 is noise, 0 is data)."""

from __future__ import annotations


def sigmas(nfe: int, shift: float = 1.0) -> tuple[float, ...]:
    """The sigmas of ``nfe`` network calls, from 1 downwards, without the final 0.

    Evenly spaced from 1 to 1/nfe, then shifted towards noise by ``s x / (1 + (s - 1) x)`` (FLUX, SD3).
    They are passed to diffusers explicitly: its own ``set_timesteps`` applies a static shift twice (#13243).

    Raises:
        ValueError: fewer than one call, or a shift that is not positive.
    """
    if nfe < 1:
        raise ValueError(f"nfe is {nfe}: accepted is 1 or more")
    if not shift > 0:
        raise ValueError(f"shift is {shift}: accepted is more than 0")
    even = [(nfe - i) / nfe for i in range(nfe)]
    return tuple(shift * x / (1 + (shift - 1) * x) for x in even)
