"""The Python client: ``fewstep.Client`` and ``fewstep.AsyncClient``, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.async_client import AsyncClient
    from fewstep.client import Client
    from fewstep.errors import FewstepError

__all__ = ["AsyncClient", "Client", "FewstepError"]
HOMES = {"AsyncClient": "fewstep.async_client", "Client": "fewstep.client", "FewstepError": "fewstep.errors"}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
