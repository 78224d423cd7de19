"""Every result store behaves the same: a folder, a bucket behind a real S3 server, a second Redis."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import StartupError
from service.listener import listen
from service.results.bucket import BucketStore
from service.results.choose import open_store
from service.results.folder import FolderStore
from service.results.memory import LARGEST_BYTES, MemoryStore
from service.results.store import ResultMissing, ResultStore
from service.settings import Settings
from service.supervise.redis_server import EmbeddedServer
from tests.service.support import check_answer, eventually, post, running_service

JOB, OTHER = "ab" + "0" * 30, "ab" + "1" * 30
KINDS = ("folder", "bucket", "memory")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket on a server process of its own."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    variables = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:

        def made() -> bool:
            try:
                return httpx.put(f"{url}/pictures", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(made, "the bucket", patience_s=120)
        yield "s3://pictures/fewstep"
    finally:
        process.kill()
        process.wait()
        log.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    kind = request.param
    if kind == "folder":
        return FolderStore(tmp_path / "results")
    if kind == "bucket":
        return BucketStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    return MemoryStore(request.getfixturevalue("redis_url") + "?db=3", 60.0)


def missing(store: ResultStore, reference: str) -> bool:
    try:
        store.get(reference)
    except ResultMissing:
        return True
    return False


@pytest.mark.parametrize("store", KINDS, indirect=True)
def test_what_is_put_is_got_until_it_is_discarded(store: ResultStore) -> None:
    data = bytes(range(256)) * 40
    winner, loser = store.put(JOB, "2", "0", "png", data), store.put(JOB, "1", "0", "png", b"loser")
    preview = store.put(JOB, "1", "p0-0", "webp", b"preview")
    assert winner == f"ab/{JOB}/2/0.png" and store.get(winner) == data and store.get(preview) == b"preview"
    for _ in range(2):
        store.discard(JOB, "1")
    assert missing(store, loser) and missing(store, preview) and store.get(winner) == data
    assert store.put(JOB, "2", "0", "png", b"again") == winner and store.get(winner) == b"again"


@pytest.mark.parametrize("store", KINDS, indirect=True)
@pytest.mark.parametrize("reference", ["../../etc/passwd", f"ab/{JOB}/1/../../x.png", "", f"ab/{JOB}/1/0.png/.."])
def test_nothing_else_can_be_named(store: ResultStore, reference: str) -> None:
    assert missing(store, reference)
    with pytest.raises(ValueError, match="not a reference"):
        store.put("../" + JOB, "1", "0", "png", b"")


@pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)
def test_the_sweeper_removes_what_is_old_and_beyond_the_quota_the_oldest(store: ResultStore) -> None:
    first = store.put(JOB, "1", "0", "png", b"x" * 600)
    time.sleep(1.1)  # S3 knows whole seconds
    second = store.put(OTHER, "1", "0", "png", b"y" * 600)
    assert store.sweep(600) == 0 and store.sweep(600, quota_bytes=1200) == 0
    assert store.sweep(600, quota_bytes=1000) == 1
    assert missing(store, first) and store.get(second) == b"y" * 600
    assert store.sweep(-1) == 1 and missing(store, second) and store.sweep(-1) == 0


@pytest.mark.parametrize("store", KINDS, indirect=True)
def test_an_empty_store_can_be_swept(store: ResultStore) -> None:
    assert store.sweep(0) == 0 == store.sweep(0, quota_bytes=1)


def test_ages_are_the_folders_and_not_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    reference = store.put(JOB, "1", "0", "png", b"bytes")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)
    assert store.sweep(3600) == 0 and store.get(reference) == b"bytes"


def test_images_in_a_second_server_end_by_themselves_and_have_a_largest_size(redis_url: str) -> None:
    store = MemoryStore(f"{redis_url}?db=3", 60.0)
    store.put(JOB, "9", "0", "png", b"x")
    assert 0 < int(store._client.pttl(f"fewstep:results:ab/{JOB}/9")) <= 60_000  # type: ignore[arg-type]
    with pytest.raises(OSError, match=f"accepts at most {LARGEST_BYTES}"):
        store.put(JOB, "9", "1", "png", bytes(LARGEST_BYTES + 1))


@pytest.mark.parametrize("url", ["s3://nowhere", "redis://127.0.0.1:1"])
def test_a_store_that_is_away_is_an_os_error(url: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(Settings(results=url))
    for action in (lambda: store.put(JOB, "1", "0", "png", b""), lambda: store.discard(JOB, "1")):
        if url.startswith("s3") and action.__code__.co_names[0] == "discard":
            continue  # nothing is found in a bucket that is not there
        with pytest.raises(OSError):
            action()


def test_the_queues_own_server_is_refused() -> None:
    url = "redis://127.0.0.1:1"
    with pytest.raises(StartupError, match="accepted are another server"):
        open_store(Settings(results=url, redis_url=url))


def test_a_service_draws_into_a_bucket(s3: str, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", RESULTS=s3) as service:
        answer: dict[str, Any] = post(service.url, prompt="in a bucket", seed=3, n=2).json()
        check_answer(answer, "in a bucket", [3, 4])
        linked = post(service.url, prompt="linked", seed=3, response_format="url").json()["data"][0]["url"]
        assert httpx.get(linked, trust_env=False, timeout=30).content.startswith(b"\x89PNG")
        assert not (tmp_path / "data" / "results").exists()


def test_a_service_draws_into_a_second_server(tmp_path: Path) -> None:
    second = EmbeddedServer(tmp_path / "second")
    second.start()
    try:
        with running_service(tmp_path / "data", RESULTS=second.url) as service:
            check_answer(post(service.url, prompt="elsewhere", seed=3).json(), "elsewhere", [3])
            assert not (tmp_path / "data" / "results").exists()
    finally:
        second.stop()
