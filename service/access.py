"""Who may use the operator's addresses."""

from __future__ import annotations

import ipaddress

from fastapi import Request

from service.errors import Forbidden


async def operator(request: Request) -> None:
    """A dependency for the operator's routes: they are for this machine.

    Raises:
        Forbidden: the request comes from elsewhere, or came through a proxy.
    """
    if not _local(request):
        raise Forbidden("This address is for the operator, on the machine of the service.")


def _local(request: Request) -> bool:
    if request.client is None or "x-forwarded-for" in request.headers or "forwarded" in request.headers:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
