"""Whether the service may listen on an address: if other machines reach it, an API key is required."""

from __future__ import annotations

import ipaddress

from service.errors import StartupError
from service.keys import KeyStore
from service.settings import Settings


def check_exposure(settings: Settings, address: str, keys: KeyStore) -> None:
    """Return if it is safe to serve on this address.

    Raises:
        StartupError: other machines could reach it without an API key.
    """
    host = address.partition("%")[0]
    guarded = any(key.active for key in keys.keys())
    if settings.public_url and not guarded and not settings.insecure:
        raise StartupError(
            "FEWSTEP_PUBLIC_URL is set, so other machines reach this service, and there is no API key: "
            "create one with fewstep keys create, or pass --insecure (FEWSTEP_INSECURE=true)."
        )
    if guarded or settings.insecure or ipaddress.ip_address(host).is_loopback:
        return
    raise StartupError(
        f"{settings.host} can be reached from other machines, and there is no API key: "
        "create one with fewstep keys create, or pass --insecure (FEWSTEP_INSECURE=true)."
    )
