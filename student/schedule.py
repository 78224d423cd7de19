"""The sigmas of a sampler: the one place that computes them (1 is noise, 0 is data)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from student.bundle import BundleError

KARRAS_RHO = 7.0  # of diffusers, and of the paper (arXiv 2206.00364)
_BY_SIZE = (
    "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
)  # fmt: skip
LAST = "last_unshifted"  # in a student's schedule; no scheduler of diffusers has a setting of this name
# Settings of diffusers' schedulers with which steps are not Euler steps along one path, or go in the other direction.
_REFUSED = {
    "use_beta_sigmas": "shifted, terminal-stretched, karras and exponential sigmas",
    "invert_sigmas": "schedules from sigma 1, noise, to 0",
    "stochastic_sampling": "steps without fresh noise",
}


def sigmas(nfe: int, shift: float = 1.0, last: float | None = None) -> tuple[float, ...]:
    """The sigmas of ``nfe`` network calls, from 1 downwards, without the final 0.

    Evenly spaced from 1 to ``last`` (1/nfe), then shifted towards noise by ``s x / (1 + (s - 1) x)`` (FLUX, SD3, Wan).
    They are passed to diffusers explicitly: its own ``set_timesteps`` applies a static shift twice (#13243).

    Raises:
        ValueError: fewer than one call, or a shift that is not positive.
    """
    if nfe < 1:
        raise ValueError(f"nfe is {nfe}: accepted is 1 or more")
    if not shift > 0:
        raise ValueError(f"shift is {shift}: accepted is more than 0")
    if last is None:
        even = [(nfe - i) / nfe for i in range(nfe)]
    else:
        even = [1 - i * (1 - last) / max(nfe - 1, 1) for i in range(nfe)]
    return tuple(shift * x / (1 + (shift - 1) * x) for x in even)


def scheduled(config: Mapping[str, Any], nfe: int, mu: float) -> tuple[float, ...]:
    """``sigmas`` as a scheduler's configuration says: shifted, stretched to its terminal value, respaced, in diffusers'
    order.

    ``mu`` is what the pipeline passes to a schedule whose shift depends on the picture's size (``linear_mu``).

    Raises:
        BundleError: the configuration needs something that no Euler path has; see ``check``.
    """
    check(config)
    values = stretched(sigmas(nfe, _shift(config, mu), config.get(LAST)), config.get("shift_terminal"))
    if config.get("use_karras_sigmas"):
        return _between(values, lambda sigma: sigma ** (1 / KARRAS_RHO), lambda step: step**KARRAS_RHO)
    if config.get("use_exponential_sigmas"):
        return _between(values, math.log, math.exp)
    return values


def by_size(config: Mapping[str, Any], last: float | None = None) -> dict[str, Any] | None:
    """What ``scheduled`` needs of a configuration whose sigmas depend on the picture's size; None for any other.

    ``last`` is the last sigma before the shift, if that is not 1/nfe.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    kept = {name: config[name] for name in _BY_SIZE if config.get(name) not in (None, False)}
    return kept if last is None else {**kept, LAST: last}


def check(config: Mapping[str, Any]) -> None:
    """Raises BundleError for a scheduler's configuration that is not supported, and names the setting."""
    for name, accepted in _REFUSED.items():
        if config.get(name):
            raise BundleError(f"the scheduler's {name} is {config[name]}: accepted are {accepted}")
    spaced = [name for name in ("use_karras_sigmas", "use_exponential_sigmas") if config.get(name)]
    if config.get("use_flow_sigmas") and spaced:
        raise BundleError(f"the scheduler's {spaced[0]} and use_flow_sigmas are both True: accepted is only one")
    if not config.get("use_dynamic_shifting") and _static(config) not in config:
        raise BundleError("the scheduler's configuration has no shift: accepted is the scheduler of a flow model")


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """The mu for a picture of ``tokens`` tokens, linear in them, as in diffusers' ``calculate_shift``."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (most - base) * (tokens - low) / (high - low))


def stretched(values: tuple[float, ...], end: float | None) -> tuple[float, ...]:
    """The distances from 1 scaled so that the last sigma is ``end``; a single sigma stays at 1."""
    if not end or values[-1] == 1:
        return values
    scale = (1 - end) / (1 - values[-1])
    return tuple(1 - (1 - value) * scale for value in values)


def _shift(config: Mapping[str, Any], mu: float) -> float:
    """A dynamic shift (FLUX.1-dev) is ``exp(mu)``, or mu itself; a static one is in the configuration."""
    if config.get("use_dynamic_shifting"):
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return float(config[_static(config)])


def _static(config: Mapping[str, Any]) -> str:
    """``shift`` (FlowMatchEuler: SD3, FLUX.1-schnell), or ``flow_shift`` (UniPC: Wan as published)."""
    return "flow_shift" if config.get("use_flow_sigmas") else "shift"


def _between(values: tuple[float, ...], bend: Any, back: Any) -> tuple[float, ...]:
    """Equally many sigmas from the first to the last, evenly spaced after the transform ``bend``."""
    first, last, gaps = bend(values[0]), bend(values[-1]), max(len(values) - 1, 1)
    return tuple(back(first + (last - first) * i / gaps) for i in range(len(values)))
