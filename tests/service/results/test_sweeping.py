"""Which results a sweep removes, where several jobs of several files are of known ages and sizes."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from service.results.bucket import BucketStore
from service.results.choose import open_store
from service.results.folder import FolderStore
from service.results.memory import LARGEST_BYTES, MemoryStore
from service.settings import Settings

JOBS = {name: f"{name}{name}" + name * 30 for name in "abc"}
AGES_S = {"a": 100, "b": 300, "c": 200}
SIZES = {"a": 10, "b": 20, "c": 40}  # in two files each


def in_a_folder(folder: Path) -> tuple[FolderStore, Any]:
    store = FolderStore(folder)
    for name, job in JOBS.items():
        store.put(job, "1", "0", "png", b"x" * (SIZES[name] - 3))
        store.put(job, "2", "p0-1", "webp", b"xxx")
    now = store._now_s()
    for name, job in JOBS.items():
        os.utime(folder / job[:2] / job, (now - AGES_S[name],) * 2)
    return store, lambda: {name for name, job in JOBS.items() if (folder / job[:2] / job).exists()}


def in_a_bucket(_: Path) -> tuple[BucketStore, Any]:
    """The second object is the older one: the age of a job is that of its newest."""
    store, now = BucketStore("s3://pictures/fewstep/"), datetime.now(UTC)
    objects: dict[str, Any] = {}
    for name, job in JOBS.items():
        for rest, size, more_s in (("1/0.png", SIZES[name] - 3, 0), ("2/p0-1.webp", 3, 1000)):
            written = now - timedelta(seconds=AGES_S[name] + more_s)
            objects[f"pictures/fewstep/{job[:2]}/{job}/{rest}"] = {"LastModified": written, "size": str(size)}

    def find(root: str, detail: bool) -> dict[str, Any]:
        assert (root, detail) == ("pictures/fewstep", True)
        return dict(objects)

    def rm(paths: list[str]) -> None:
        for path in paths:
            del objects[path]

    store._objects = SimpleNamespace(find=find, rm=rm)
    return store, lambda: {path.split("/")[2][0] for path in objects}


@pytest.mark.parametrize("made", [in_a_folder, in_a_bucket])
@pytest.mark.parametrize(
    ("older_than_s", "quota_bytes", "kept"),
    [
        (350, 0, "abc"),
        (250, 0, "ac"),
        (150, 0, "a"),
        (50, 0, ""),
        (350, 70, "abc"),
        (350, 69, "ac"),
        (350, 50, "ac"),
        (350, 49, "a"),
        (350, 9, ""),
        (250, 50, "ac"),
        (250, 49, "a"),
    ],
)
def test_what_is_too_old_goes_and_then_the_oldest_until_the_rest_fits(
    made: Any, older_than_s: float, quota_bytes: int, kept: str, tmp_path: Path
) -> None:
    store, left = made(tmp_path)
    assert store.sweep(older_than_s, quota_bytes) == 3 - len(kept)
    assert left() == set(kept)


def test_what_another_sweeper_has_removed_meanwhile_is_passed_over(tmp_path: Path) -> None:
    store, left = in_a_folder(tmp_path)
    remove = store._files.rm

    def rm(path: str, recursive: bool) -> None:
        if path.endswith(JOBS["b"]):
            raise FileNotFoundError(path)
        remove(path, recursive=recursive)

    store._files = SimpleNamespace(rm=rm)
    assert store.sweep(150) == 1 and left() == {"a", "b"}, "the oldest was not removed here, and the next one was"


def test_a_picture_in_the_second_server_may_have_two_mebibytes_and_ends_after_its_time(redis_url: str) -> None:
    url = f"{redis_url}?db=3"
    store = open_store(Settings(results=url, result_ttl_s=777, redis_url=redis_url))
    assert isinstance(store, MemoryStore) and LARGEST_BYTES == 2 * 2**20
    job = JOBS["a"]
    first = store.put(job, "3", "0", "png", bytes(LARGEST_BYTES))
    with Redis.from_url(url) as client:
        key = f"fewstep:results:{job[:2]}/{job}/3"
        assert 700_000 < client.pttl(key) <= 777_000
        client.pexpire(key, 1000)
        store.put(job, "3", "1", "png", b"second")
        assert 700_000 < client.pttl(key) <= 777_000, "the claim's last picture begins its time anew"
        assert set(client.hkeys(key)) == {b"0.png", b"1.png"}
    assert len(store.get(first)) == LARGEST_BYTES and store.sweep(0, 1) == 0
    store.discard(job, "3")
