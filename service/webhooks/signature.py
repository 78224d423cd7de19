"""Signatures of the Standard Webhooks specification (standardwebhooks.com): HMAC-SHA256 over id, time and body."""

from __future__ import annotations

import base64
import hashlib
import hmac


def headers(key: bytes, id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The headers that let a receiver know who sent this, and when; ``id`` is the same each time it is sent."""
    signed = f"{id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
    return {"webhook-id": id, "webhook-timestamp": str(timestamp_s), "webhook-signature": f"v1,{signature}"}
