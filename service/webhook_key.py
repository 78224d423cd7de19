"""The secret with which webhooks are signed, in the form of the Standard Webhooks specification."""

from __future__ import annotations

import base64
import binascii

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
        raise ValueError(f"must hold 24 to 64 bytes, but holds {len(key)}")
    return key
