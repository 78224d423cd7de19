"""What a worker loads and drops as the registry says, and the memory that it counts for it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.models.folder import Folder, Name
from service.models.loaded import LoadedModels
from service.models.loader import ModelLoader
from service.models.registry import Entry, ModelState, ModelStates, WorkerRegistry
from service.observe.background import Background
from service.settings import Settings
from student.runtimes.runtime import Runtime
from tests.service.students import make_student
from tests.service.support import Queue

MB = 2**20


class Loading:
    """A loader that has room for one student of the folder and a bit; ``follow(a="1")``: attempt 1 to load a/1."""

    def __init__(self, queue: Queue, folder: Path) -> None:
        settings = Settings(models=folder, runtime="fake", model_memory_mb=100)
        self.loaded = LoadedModels()
        registry = WorkerRegistry(queue.client, queue.model)
        self._loader = ModelLoader(settings, Folder(folder), registry, self.loaded, Background())

    def follow(self, state: ModelState = ModelState.LOADING, **attempts: str) -> set[str]:
        entries = {f"{id}/1": Entry(state, attempt) for id, attempt in attempts.items()}
        self._loader.follow(ModelStates(entries))
        return self.loaded.names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two students that take 80 MB each."""
    for id in ("a", "b"):
        make_student(tmp_path, id, "1", 4 * MB)
    return tmp_path


def test_a_student_that_was_refused_takes_no_memory(queue: Queue, folder: Path) -> None:
    loading = Loading(queue, folder)
    weights = folder / "a" / "1" / "transformer" / "weights.safetensors"
    weights.write_bytes(bytes(4 * MB - 1) + b"x")
    assert loading.follow(a="1") == set()
    assert "has changed" in (loading.loaded.refused("a/1") or {})["reason"]
    assert loading.follow(a="1", b="1") == {"b/1"}


def test_there_is_room_for_one_and_a_student_that_was_dropped_makes_room(queue: Queue, folder: Path) -> None:
    loading = Loading(queue, folder)
    assert loading.follow(a="1", b="1") == {"a/1"}
    assert "only 20 MB of the 100 MB" in (loading.loaded.refused("b/1") or {})["reason"]
    assert loading.follow(b="1") == set(), "the same attempt is not made again"
    assert loading.follow(b="2") == {"b/1"}


def test_a_registry_that_has_lost_everything_drops_nothing(queue: Queue, folder: Path) -> None:
    loading = Loading(queue, folder)
    assert loading.follow(a="1") == loading.follow() == {"a/1"}


def test_a_student_that_others_serve_is_tried_again_after_pauses_that_double_up_to_an_hour(
    queue: Queue, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files were away when the worker started; nobody need unload it and load it again."""
    loading, clock, tries = Loading(queue, folder), [1000.0], list[float]()
    times = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("service.models.loader.time", times)
    load = loading._loader._load

    def note(name: Name) -> Runtime:
        tries.append(clock[0] - 1000)
        return load(name)

    monkeypatch.setattr(loading._loader, "_load", note)
    (folder / "a").rename(folder / ".away")
    for second in range(0, 11_000, 60):
        clock[0] = 1000.0 + second
        assert loading.follow(ModelState.SERVING, a="1") == set()
    assert tries == [0, 60, 180, 420, 900, 1860, 3780, 7380, 10980]
    assert loading.follow(a="1") == set() and len(tries) == 9, "one that is to be loaded was refused to an operator"
    (folder / ".away").rename(folder / "a")
    clock[0] = 20_000.0
    assert loading.follow(ModelState.SERVING, a="1") == {"a/1"} and loading.loaded.refused("a/1") is None
