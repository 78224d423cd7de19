"""Signatures of the Standard Webhooks specification (standardwebhooks.com): HMAC-SHA256 over id, time and body."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

PREFIX = "whsec_"
KEY_BYTES = range(24, 65)


def key_of(secret: str) -> bytes:
    """The key in a secret of the form ``whsec_<base64>``.

    Raises:
        ValueError: it has another form, or is too short to be safe.
    """
    if not secret.startswith(PREFIX):
        raise ValueError("must be whsec_ and 24 to 64 random bytes in base64")
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        raise ValueError("must be whsec_ and base64") from None
    if len(key) not in KEY_BYTES:
        raise ValueError(f"must hold 24 to 64 bytes, and holds {len(key)}")
    return key


def headers(key: bytes, id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The headers that let a receiver know who sent this, and when; ``id`` is the same each time it is sent."""
    signed = f"{id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
    return {"webhook-id": id, "webhook-timestamp": str(timestamp_s), "webhook-signature": f"v1,{signature}"}
