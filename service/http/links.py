"""Signed image URLs that work without an API key until they expire, as an <img src> needs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from service.errors import Forbidden
from service.queue.job import Record
from service.queue.producer import Producer

SECRET_KEPT_S = 60.0
SIGNATURE_BYTES = 18
EXPIRED = "This link is invalid or has expired: fetch the job, which has a new one."


@dataclass(frozen=True)
class Link:
    """A URL; ``expires`` is the Unix time at which it stops working, in seconds."""

    url: str
    expires: int


class Links:
    """Signs URLs with a secret that all HTTP processes of a queue share."""

    def __init__(self, producer: Producer, lifetime_s: float) -> None:
        self._producer = producer
        self._lifetime_s = lifetime_s
        self._secret = b""
        self._read_at = 0.0

    async def to_image(self, base_url: str, record: Record, index: int) -> Link:
        """The link to an image of a job that is done; it works for as long as the image is kept.

        Raises:
            RedisError: the queue is out of reach.
        """
        expires = self.expires(record)
        signature = sign(await self._key(), record.id, index, expires)
        return Link(f"{base_url}jobs/{record.id}/images/{index}?expires={expires}&signature={signature}", expires)

    def expires(self, record: Record) -> int:
        """Until when a job that has ended, and its images, are kept, as a Unix time."""
        return int((record.finished_s or record.created_s) + self._lifetime_s)

    async def check(self, id: str, index: int, expires: int, signature: str) -> None:
        """Return if this link was signed by this service and is still valid.

        Raises:
            Forbidden: it was not, or no longer does.
            RedisError: the queue is out of reach.
        """
        right = hmac.compare_digest(sign(await self._key(), id, index, expires).encode(), signature.encode())
        if not right or expires < time.time():
            raise Forbidden(EXPIRED, "signature", code="link_expired")

    async def _key(self) -> bytes:
        if not self._secret or time.monotonic() - self._read_at > SECRET_KEPT_S:
            found = await self._producer.shared_secret("links")
            if found is None:  # the links of this response will not work, but the response can be read
                return secrets.token_bytes(32)
            self._secret, self._read_at = found, time.monotonic()
        return self._secret


def sign(secret: bytes, id: str, index: int, expires: int) -> str:
    """The signature of a link to this image with this expiry."""
    digest = hmac.new(secret, f"{id}/{index}/{expires}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest[:SIGNATURE_BYTES]).decode("ascii")
