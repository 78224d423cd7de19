"""Hostile requests, and how much they slow other clients: ``python -m benchmarks.hostile --url http://127.0.0.1:8000``.

The corpus is a function of its seed: truncated, deep, huge, wrongly encoded and mistyped bodies; long, odd and
contradictory headers; addresses with every trick. Nothing of it may be answered with 5xx.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx

PATIENCE_S = 30.0
UNFINISHED = (b"Content-Length: 9999", b"chunked", b"Expect:")  # else the server waits for the rest, as it should
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NO_ANSWER = 0  # the server closed the connection without a word: what it does with what is no HTTP
FIELDS = (
    "prompt", "seed", "seeds", "n", "num_images_per_prompt", "steps", "num_inference_steps", "size", "height", "width",
    "model", "model_version", "quality", "output_format", "response_format", "stream", "partial_images", "priority",
    "user", "metadata", "timeout_s", "webhook_url", "webhook_events", "negative_prompt", "__proto__", "",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, -1, 0, 2**63, 1e308, -0.0, "", "x" * 5000, "\x00", "\u202e", "😀" * 300, [], [[]], {}, {"a": {"b": []}},
    "../../etc/passwd", "http://169.254.169.254/", "';--", "${jndi:ldap://x}", [1] * 2000, "nan", "64x64x64", "auto",
)  # fmt: skip
PATHS = (
    "/generate", "/jobs", "/jobs/0", "/jobs/%00", "/jobs/../../etc/passwd", "/jobs/" + "f" * 32, "/jobs/" + "f" * 4000,
    "/jobs/%2e%2e%2f", "/jobs/" + "0" * 32 + "/images/-1", "/jobs/" + "0" * 32 + "/images/99999999999999999999",
    "/jobs/" + "0" * 32 + "/events", "/v1/models", "/v1/models/%ff%fe", "/v1/images/generations", "/admin/dlq",
    "/admin/dlq/x/retry", "/admin/models/a/b/load", "/metrics", "/page/../settings.py", "/page/%2e%2e/run.py", "//",
    "/?", "/jobs?limit=-1", "/jobs?limit=1e9", "/info?" + "a=b&" * 500, "/\\..\\", "/%", "/;a=b", "*",
    "http://other/generate",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO", "get")
HEADERS = (
    b"Content-Type: application/json; charset=utf-16", b"Content-Type: multipart/form-data", b"Content-Encoding: gzip",
    b"Authorization: Bearer \xff\xfe", b"Authorization: " + b"A" * 4000, b"Idempotency-Key: " + b"k" * 3000,
    b"Idempotency-Key: \x01", b"Prefer: wait=99999999999999999999", b"Prefer: wait=-1, respond-async;;;=",
    b"Prefer: " + b"a," * 1000, b"Last-Event-ID: nan", b"X-Request-ID: \"'<script>", b"Host: ", b"Range: bytes=9-1",
    b"Transfer-Encoding: chunked", b"Content-Length: -1", b"Content-Length: 99999999999999999999",
    b"Expect: 100-continue", b"X-Forwarded-For: 127.0.0.1", b"Upgrade: websocket\r\nConnection: Upgrade", b": empty",
    b"Cookie: " + b"c" * 7000,
    b"traceparent: 00-zz-zz-zz", b"Accept: */*;q=nan", b"no colon at all", b"X-Bad\x00Name: 1",
)  # fmt: skip


def corpus(seed: int, count: int) -> Iterator[bytes]:
    """So many requests, as they go over the wire; each asks that the connection be closed."""
    chosen = random.Random(seed)
    for _ in range(count):
        body = _body(chosen)
        path = "/generate" if chosen.random() < 0.5 else chosen.choice(PATHS)
        method = "POST" if chosen.random() < 0.7 else chosen.choice(METHODS)
        lines = [f"{method} {path} HTTP/1.1".encode("utf-8", "surrogatepass"), b"Host: localhost", b"Connection: close"]
        lines += chosen.sample(HEADERS, chosen.choice((0, 0, 1, 1, 2)))
        if not any(line.lower().startswith(b"content-type") for line in lines):
            lines.append(b"Content-Type: application/json")
        if not any(line.lower().startswith((b"content-length", b"transfer")) for line in lines):
            lines.append(b"Content-Length: %d" % len(body))
        yield b"\r\n".join(lines) + b"\r\n\r\n" + body


def _body(chosen: random.Random) -> bytes:
    fields = {chosen.choice(FIELDS): chosen.choice(VALUES) for _ in range(chosen.choice((0, 1, 2, 5)))}
    whole = json.dumps({"prompt": "p", **fields}).encode()
    kind = chosen.randrange(8)
    if kind == 0:
        return whole[: chosen.randrange(len(whole))]
    if kind == 1:
        return chosen.randbytes(chosen.randrange(200))
    if kind == 2:
        depth = chosen.choice((10, 1000, 20000))
        return b'{"prompt": ' + chosen.choice((b"[", b'{"a":')) * depth
    if kind == 3:
        return json.dumps({"prompt": "p", "metadata": {"a": "x" * chosen.choice((1000, 70000, 200000))}}).encode()
    if kind == 4:
        return whole.decode().encode(chosen.choice(("utf-16", "utf-32", "utf-7")))
    if kind == 5:
        return b'{"prompt": "\\ud800", "seed": ' + b"9" * chosen.choice((5, 500, 5000)) + b"}"
    return whole


def send(address: tuple[str, int], request: bytes) -> int:
    """The status of the answer, or ``NO_ANSWER``."""
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        try:
            connection.sendall(request)
            if any(word in request for word in UNFINISHED):
                with contextlib.suppress(OSError):  # the service may have refused and closed already
                    connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
            while data := connection.recv(65536):
                answer = (answer + data)[:65536]
        except (ConnectionError, TimeoutError):
            return NO_ANSWER
    parts = answer.removeprefix(CONTINUE).split(b" ", 2)
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else NO_ANSWER


def flood(address: tuple[str, int], seed: int, count: int, threads: int) -> Counter[int]:
    """Send a corpus; how often each status came."""
    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(lambda request: send(address, request), corpus(seed, count)))


def latencies(url: str, count: int) -> list[float]:
    """Seconds that each of ``count`` honest requests takes, one after the other."""
    taken = []
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        for k in range(count):
            began = time.perf_counter()
            client.post(f"{url}/generate", json={"prompt": "honest", "seed": k}).raise_for_status()
            taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--honest", type=int, default=100)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    parts = httpx.URL(chosen.url)
    address = (parts.host, parts.port or 80)
    latencies(chosen.url, 5)
    alone = statistics.median(latencies(chosen.url, chosen.honest))
    statuses: Counter[int] = Counter()
    attack = threading.Thread(
        target=lambda: statuses.update(flood(address, chosen.seed, chosen.requests, chosen.threads))
    )
    attack.start()
    during: list[float] = []
    while attack.is_alive():
        during += latencies(chosen.url, 5)
    print(f"statuses: {dict(sorted(statuses.items()))} ({NO_ANSWER}: closed without an answer)")
    attacked = statistics.median(during)
    print(f"an honest client's median: {alone * 1000:.1f} ms alone, {attacked * 1000:.1f} ms during the flood")
    print(f"slowed by {attacked / alone:.2f}")


if __name__ == "__main__":
    main()
