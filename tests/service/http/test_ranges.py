"""Parts of a file, by the rules of RFC 9110 (14.1.2), worked out on ten bytes."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.responses import Response

from service.http.ranges import part_of

WHOLE = b"0123456789"


def asked(**headers: str) -> Response:
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    whole = Response(WHOLE, 200, {"ETag": '"tag"', "X-Seed": "7"}, "image/png")
    return part_of(Request({"type": "http", "method": "GET", "path": "/", "headers": fields}), whole)


@pytest.mark.parametrize(
    ("header", "part", "place"),
    [
        ("bytes=0-0", b"0", "0-0"), ("bytes=0-9", WHOLE, "0-9"), ("bytes=2-4", b"234", "2-4"),
        ("bytes=8-", b"89", "8-9"), ("bytes=0-", WHOLE, "0-9"), ("bytes=9-99", b"9", "9-9"),
        ("bytes=-3", b"789", "7-9"), ("bytes=-10", WHOLE, "0-9"), ("bytes=-99", WHOLE, "0-9"),
    ],
)  # fmt: skip
def test_a_part_is_sent_with_its_place(header: str, part: bytes, place: str) -> None:
    response = asked(range=header)
    assert (response.status_code, response.body) == (206, part)
    headers = dict(response.headers)
    assert headers["content-range"] == f"bytes {place}/10" and headers["content-length"] == str(len(part))
    assert (headers["content-type"], headers["x-seed"], headers["etag"]) == ("image/png", "7", '"tag"')
    assert headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-11", "bytes=5-4", "bytes=-0", "bytes=99-100"])
def test_what_is_beyond_the_end_is_refused_with_the_size(header: str) -> None:
    response = asked(range=header)
    assert (response.status_code, response.body, response.headers["content-range"]) == (416, b"", "bytes */10")


@pytest.mark.parametrize(
    "header", ["", "bytes=-", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes = 0-1", "bytes=1" + "0" * 15 + "-"]
)
def test_whatever_else_is_asked_for_gets_the_whole(header: str) -> None:
    response = asked(range=header) if header else asked()
    assert (response.status_code, response.body) == (200, WHOLE) and "content-range" not in response.headers
    assert response.headers["accept-ranges"] == "bytes", "players look for it"


def test_a_part_of_what_has_changed_meanwhile_is_the_whole() -> None:
    assert asked(range="bytes=0-1", if_range='"tag"').status_code == 206
    assert asked(range="bytes=0-1", if_range='"another"').status_code == 200
