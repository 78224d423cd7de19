"""The formats that pictures are stored in."""

from __future__ import annotations

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
