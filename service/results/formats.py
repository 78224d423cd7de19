"""The formats that pictures and videos are stored in."""

from __future__ import annotations

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
PICTURES = ("png", "jpeg", "webp")
VIDEOS = ("mp4", "webp")
