"""Parts of a file (RFC 9110, 14): players ask for them, and Safari plays no video without."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.results.formats import MEDIA_TYPES

PICTURES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
PARTS: dict[int | str, dict[str, Any]] = {
    206: {"description": "The part that the Range header asks for.", "content": PICTURES},
    416: {"description": "The Range header asks for what is beyond the end.", "content": {}},
}
RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


def part_of(request: Request, whole: Response) -> Response:
    """The part of a file that a request asks for: 206, or 416 for one beyond its end; else all of it, as it is.

    Several parts in one request are answered with the whole file, as the RFC allows.
    """
    whole.headers["Accept-Ranges"] = "bytes"
    asked = RANGE.fullmatch(request.headers.get("range", ""))
    unchanged = request.headers.get("if-range") in (None, whole.headers.get("etag"))
    if asked is None or not any(asked.groups()) or not unchanged:
        return whole
    size = len(whole.body)
    first, last = bounds(asked[1], asked[2], size)
    headers = {name: value for name, value in whole.headers.items() if name != "content-length"}
    if first >= size or first > last:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Response(bytes(whole.body)[first : last + 1], 206, headers)


def bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """The first and the last byte; ``-500`` means the last 500."""
    if not first:
        return max(0, size - int(last)), size - 1 if int(last) else -1
    return int(first), min(int(last), size - 1) if last else size - 1
