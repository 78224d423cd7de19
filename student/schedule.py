"""When a sampler looks at the picture: the one place that computes sigmas (1 is noise, 0 is data)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from student.bundle import BundleError

# Settings of diffusers' schedulers that bend the sigmas in other ways than a shift; no family here uses them.
_BENDING = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def sigmas(nfe: int, shift: float = 1.0) -> tuple[float, ...]:
    """The sigmas of ``nfe`` network calls, from 1 downwards, without the final 0.

    Evenly spaced from 1 to 1/nfe, then shifted towards noise by ``s x / (1 + (s - 1) x)`` (FLUX, SD3, Wan).
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


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The shift that a pipeline's scheduler applies to latents of ``tokens`` tokens, read from its configuration.

    A dynamic shift (FLUX.1-dev) is ``exp(mu)`` with mu linear in the tokens, as diffusers' ``calculate_shift`` says
    it; a static one is ``shift`` (FlowMatchEuler: SD3, FLUX.1-schnell) or ``flow_shift`` (UniPC: Wan as published).

    Raises:
        BundleError: not a schedule of a flow model, or one that is bent in another way than by a shift.
    """
    for name in _BENDING:
        if config.get(name):
            raise BundleError(f"the scheduler's {name} is {config[name]}: accepted is a schedule that is only shifted")
    if config.get("use_dynamic_shifting"):
        return _dynamic_shift(config, tokens)
    name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    if name not in config:
        raise BundleError("the scheduler's configuration has no shift: accepted is the scheduler of a flow model")
    return float(config[name])


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (most - base) * (tokens - low) / (high - low)
    return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
