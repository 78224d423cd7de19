"""What a worker says of the students that it holds, and what becomes of one that cannot be loaded."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import StartupError
from service.models import loader as module
from service.models.folder import Folder, Name
from service.models.loaded import LoadedModels
from service.models.loader import ModelLoader
from service.models.registry import Entry, ModelState, ModelStates
from service.observe.background import Background
from service.settings import Settings
from student.bundle import BundleError, Student
from student.probe import Probe
from student.runtimes.fake import FakeRuntime, fake_student, fake_video_student
from student.runtimes.sizes import SizeRange


def runtime(student: Student | None = None, **about: Any) -> Any:
    found: Any = FakeRuntime(student)
    for name, value in about.items():
        setattr(found, name, value)
    return found


def student(id: str, version: str = "1") -> Student:
    return replace(fake_student(), id=id, version=version)


def test_a_worker_says_all_of_each_student_and_of_itself_what_its_first_one_is() -> None:
    loaded = LoadedModels()
    assert loaded.info == {
        "host": socket.gethostname(), "models": {}, "refused": {}, "runtime": "", "max_batch": 1, "shows_steps": False,
        "state": "loading",
    }  # fmt: skip
    first = runtime(student("a"), warm_up_s=1.23456, size_range=SizeRange(16, 128), max_batch=3)
    loaded.put(first, load_s=2.34567)
    loaded.put(runtime(fake_video_student(), warm_up_s=7.0))
    about = {
        "runtime": "fake", "max_batch": 3, "shows_steps": True, "sides_px": {"multiple_px": 16, "most_px": 128},
        "load_s": 2.346, "warm_up_s": 1.235, "lengths": {}, "probe": {"outcome": "none"},
    }  # fmt: skip
    assert loaded.info["models"]["a/1"] == about and loaded.info["models"]["fake-video/1"]["lengths"] == {
        "64x64": [1, 33, 4]
    }
    assert {name: loaded.info[name] for name in about} == about and loaded.info["state"] == "ready"
    assert loaded.names == {"a/1", "fake-video/1"} and loaded.warm_up_s == 7.0
    assert set(loaded.lanes) == {"3|a|1", "3|fake-video|1"}
    loaded.drop("fake-video/1")
    assert loaded.names == {"a/1"} and loaded.warm_up_s == pytest.approx(1.23456)
    loaded.drop("a/1")
    assert (loaded.info["state"], loaded.info["models"], loaded.warm_up_s) == ("loading", {}, 0.0)


def test_a_probe_is_waited_for_then_told_and_begins_anew_with_another_runtime() -> None:
    loaded, pictures = LoadedModels(), runtime(student("a"))
    probe: Any = object()

    def told() -> Any:
        return loaded.info["models"]["a/1"]["probe"]

    loaded.put(pictures, probe=probe)
    assert told() == {"outcome": "waiting"} and loaded.probes == {"3|a|1": probe}
    loaded.probed(pictures, {"outcome": "same", "at_s": 5})
    loaded.put(runtime(student("b")))
    assert told() == {"outcome": "same", "at_s": 5}
    loaded.put(runtime(student("a")), probe=probe)
    assert told() == {"outcome": "waiting"}
    loaded.put(runtime(student("a")))
    assert told() == {"outcome": "none"} and loaded.probes == {}


def test_a_refusal_is_told_until_the_student_is_loaded() -> None:
    loaded = LoadedModels()
    loaded.refuse("a/1", "try", "no room")
    loaded.refuse("b/1", "try", "gone")
    assert loaded.refused("a/1") == {"attempt": "try", "reason": "no room"} and loaded.refused("c/1") is None
    loaded.put(runtime(student("a")))
    assert loaded.info["refused"] == {"b/1": {"attempt": "try", "reason": "gone"}} and loaded.refused("a/1") is None


class Following:
    """A loader whose loading gives what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, idle: bool = True) -> None:
        self.asked: list[str] = []
        self.gives: Exception | None = None
        self.loaded = LoadedModels()
        self.idle_asked: list[str] = []
        registry: Any = SimpleNamespace(idle=lambda lane: self.idle_asked.append(lane) or idle)
        self.loader = ModelLoader(
            Settings(models=Path("/none"), runtime="fake"), Folder(Path("/none")), registry, self.loaded, Background()
        )
        monkeypatch.setattr(ModelLoader, "_load", lambda _, name: self._load(name))
        monkeypatch.setattr(module, "probe_of", lambda bundle, found: None)

    def _load(self, name: Name) -> Any:
        self.asked.append(str(name))
        if self.gives is not None:
            raise self.gives
        return runtime(student(name.id, name.version))

    def follow(self, **states: str) -> set[str]:
        entries = {name.replace("_", "/"): Entry(ModelState(state), "try") for name, state in states.items()}
        self.loader.follow(ModelStates(entries))
        return self.loaded.names


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BundleError("it has no steps"), "it has no steps"),
        (MemoryError(), "it does not fit into memory"),
        (ZeroDivisionError("x"), "loading it failed (ZeroDivisionError)"),
    ],
)
def test_a_student_that_cannot_be_loaded_is_refused_for_a_reason_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    following = Following(monkeypatch)
    following.gives = error
    for _ in range(2):
        assert following.follow(a_1="loading") == set()
    assert following.asked == ["a/1"] and following.loaded.refused("a/1") == {"attempt": "try", "reason": reason}


def test_what_is_wanted_is_loaded_and_the_rest_dropped_once_nothing_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    following = Following(monkeypatch)
    wanted = {"a_1": "loading", "b_1": "serving", "c_1": "unloading", "d_1": "unloaded", "e_1": "refused"}
    assert following.follow(**wanted) == {"a/1", "b/1"} and following.idle_asked == []
    assert following.follow(a_1="serving", b_1="unloading") == {"a/1"} and following.idle_asked == ["3|b|1"]
    busy = Following(monkeypatch, idle=False)
    busy.follow(a_1="loading")
    assert busy.follow(b_1="loading") == {"a/1", "b/1"}, "its jobs are drawn first"


def test_the_first_states_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    following, waits = Following(monkeypatch), list[float]()
    answers = [ModelStates(), ModelStates({"a/1": Entry(ModelState.LOADING)})]
    following.loader._registry.read = lambda: answers.pop(0)  # type: ignore[method-assign]
    stopping: Any = SimpleNamespace(is_set=lambda: False, wait=waits.append)
    following.loader.first(stopping)
    assert following.loaded.names == {"a/1"} and waits == [0.2]


def test_a_probe_that_cannot_be_read_costs_no_student(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Probe("x", (), {})

    def read(bundle: Path, student: Student) -> Probe:
        if bundle.name == "broken":
            raise BundleError("its probe is of another student")
        return found

    monkeypatch.setattr(module, "read_probe", read)
    assert module.probe_of(Path("whole"), runtime()) is found and module.probe_of(Path("broken"), runtime()) is None


def test_states_that_cannot_be_read_yet_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    following, waits = Following(monkeypatch), list[float]()
    answers: list[Any] = [RedisConnectionError("away"), ModelStates({"a/1": Entry(ModelState.SERVING)})]

    def read() -> ModelStates:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    following.loader._registry.read = read  # type: ignore[method-assign]
    following.loader.first(SimpleNamespace(is_set=lambda: False, wait=waits.append))  # type: ignore[arg-type]
    assert following.loaded.names == {"a/1"} and waits == [0.2]
    following.loader.first(SimpleNamespace(is_set=lambda: True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "refused", "ends"),
    [((), ("a/1",), True), (("b/1",), ("a/1",), False), (("b/1",), (), False), ((), (), False)],
)
def test_a_worker_ends_only_where_none_of_the_students_can_be_loaded(
    held: tuple[str, ...], refused: tuple[str, ...], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Any] = []

    def first(loader: ModelLoader, stopping: Any) -> None:
        for name in held:
            loader._loaded.put(runtime(student(name[0])))
        for name in refused:
            loader._loaded.refuse(name, "try", "no room")

    monkeypatch.setattr(ModelLoader, "first", first)
    monkeypatch.setattr(ModelLoader, "run", lambda _, stopping: followed.append(stopping))
    monkeypatch.setattr(module, "connect", lambda url: None)
    monkeypatch.setattr(module, "WorkerRegistry", lambda client, queue: queue)
    settings = Settings(runtime="fake", models=Path("/none"), redis_url="redis://127.0.0.1:1")
    loaded, stopping = LoadedModels(), threading.Event()
    if ends:
        with pytest.raises(StartupError, match="No student of FEWSTEP_MODELS can be loaded; a/1: no room."):
            module.open_models(settings, loaded, stopping, Background())
    else:
        module.open_models(settings, loaded, stopping, Background())
    for thread in threading.enumerate():
        if thread.name == "loader":
            thread.join(10)
    assert followed == ([] if ends else [stopping]) and loaded.names == set(held)
