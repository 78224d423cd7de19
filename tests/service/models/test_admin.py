"""The operator's actions on models: what each asks of the registry, and how each of its words is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import Conflict, ModelRefused, NotFound, ServiceError
from service.models import admin
from service.models.choice import Choice, Served
from service.models.controller import Version
from service.models.folder import Name
from service.models.registry import ModelState
from service.quality.canary import Canary, Plan
from student.bundle import BundleError
from student.runtimes.fake import fake_student

ONE, TWO, NONE = Name("cats", "1"), Name("cats", "2"), Name("cats", "9")
RUNNING = Canary("cats", "1", "2", "e", 0.05, Plan())


class Models:
    """A controller of two versions, of which the first is served; ``word`` is what the registry answers, and
    ``states`` those of the version that is looked at, one after another."""

    def __init__(self, word: Any = "ok", states: tuple[str, ...] = (ModelState.SERVING,), broken: str = "") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.states = SimpleNamespace(canaries={"cats": RUNNING})
        self.choice = Choice({ONE: Served(fake_student(), len)}, {"cats": "1"})
        self.registry = SimpleNamespace(
            promote=self._answer("promote", word),
            unload=self._answer("unload", word),
            start_canary=self._answer("start_canary", word),
            end_canary=self._answer("end_canary", word),
        )
        self.load = self._answer("load", None)
        self.folder = SimpleNamespace(names=lambda: [ONE, TWO], student=self._read)
        self._states = list(states)
        self._broken = broken

    def _answer(self, verb: str, word: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def answer(*args: Any) -> Any:
            self.asked.append((verb, *args))
            return word

        return answer

    def _read(self, name: Name) -> Any:
        if self._broken:
            raise BundleError(self._broken)
        return fake_student()

    async def refresh(self) -> None:
        if len(self._states) > 1:
            self._states.pop(0)

    def version(self, name: Name) -> Version:
        return Version(name, self._states[0], "no room", False, ())

    def versions(self) -> list[Version]:
        return [self.version(name) for name in (ONE, TWO)]


def act(models: Models, verb: str, *args: Any) -> Any:
    return asyncio.run(getattr(admin, verb)(models, *args))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "POLL_EVERY_S", 0.001)


def test_a_version_is_loaded_and_waited_for() -> None:
    loading = ModelState.LOADING
    models = Models(states=(loading, loading, loading, ModelState.SERVING))
    assert act(models, "load", TWO, 9.0).state == "serving" and models.asked == [("load", TWO)]
    assert act(Models(states=(loading,)), "load", TWO, 0.005).state == "loading", "no longer than it was told to"
    assert act(Models(states=(loading, loading, loading, ModelState.SERVING)), "load", TWO, 0.0).state == "loading"


def test_an_unloaded_version_is_waited_for_until_no_worker_holds_it() -> None:
    models = Models(states=(ModelState.SERVING, ModelState.SERVING, ModelState.UNLOADING, ModelState.UNLOADED))
    assert act(models, "unload", TWO, 9.0).state == "unloaded" and models.asked == [("unload", "cats/2")]
    assert act(Models(states=(ModelState.UNLOADING,)), "unload", TWO, 0.005).state == "unloading"


@pytest.mark.parametrize("state", [ModelState.UNLOADING, ModelState.UNLOADED])
def test_what_is_unloaded_already_may_be_unloaded_again(state: ModelState) -> None:
    assert act(Models("missing", states=(state,)), "unload", TWO, 0.0).state == state


def test_a_served_version_is_made_the_latest() -> None:
    models = Models(True)
    assert act(models, "promote", TWO).name == TWO and models.asked == [("promote", "cats", "2")]


def test_a_canary_loads_its_version_first_where_it_is_not_served() -> None:
    models = Models()
    plan = Plan(margin=0.2)
    assert act(models, "start_canary", TWO, 0.1, plan, 1.0) is RUNNING
    assert models.asked == [("load", TWO), ("start_canary", "cats", "2", 0.1, plan)]
    served = Models()
    act(served, "start_canary", ONE, 0.1, plan, 1.0)
    assert [verb for verb, *_ in served.asked] == ["start_canary"]


def test_a_canary_is_stopped_by_the_operator() -> None:
    models = Models()
    assert act(models, "stop_canary", TWO) is RUNNING
    assert models.asked == [("end_canary", RUNNING, "stopped", "by the operator")]


CANARY = (0.1, Plan(), 0.0)


@pytest.mark.parametrize(
    ("models", "verb", "args", "kind", "words"),
    [
        (Models(), "load", (NONE, 0.0), NotFound, "no such model or version"),
        (Models(broken="it has no steps"), "load", (TWO, 0.0), ModelRefused, "cats/2 is refused: it has no steps."),
        (Models(states=(ModelState.REFUSED,)), "load", (TWO, 0.0), ModelRefused, "cats/2 is refused: no room."),
        (Models(), "promote", (NONE,), NotFound, "no such model or version"),
        (Models(False), "promote", (TWO,), Conflict, "cats/2 is not served: load it first."),
        (Models(), "unload", (NONE, 0.0), NotFound, "no such model or version"),
        (Models("promoted"), "unload", (ONE, 0.0), Conflict, "the latest version of its model: promote another"),
        (Models("last"), "unload", (ONE, 0.0), Conflict, "the only served model"),
        (Models("missing"), "unload", (TWO, 0.0), Conflict, "cats/2 is not served."),
        (Models("missing"), "start_canary", (ONE, *CANARY), Conflict, "not served yet"),
        (Models("latest"), "start_canary", (ONE, *CANARY), Conflict, "is the latest of its model"),
        (Models("running"), "start_canary", (ONE, *CANARY), Conflict, "Another canary of cats is running"),
        (Models(), "stop_canary", (ONE,), NotFound, "There is no canary of cats/1."),
        (Models(), "stop_canary", (Name("dogs", "2"),), NotFound, "There is no canary of dogs/2."),
    ],
)
def test_what_cannot_be_done_is_refused_and_why(
    models: Models, verb: str, args: tuple[Any, ...], kind: type[ServiceError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        act(models, verb, *args)
    assert caught.value.param == "version" and words in str(caught.value)


@pytest.mark.parametrize("verb", ["load", "promote", "unload"])
def test_a_version_that_nobody_knows_is_a_model_not_found_and_nothing_is_asked(verb: str) -> None:
    models = Models()
    with pytest.raises(NotFound) as caught:
        act(models, verb, NONE, *([] if verb == "promote" else [0.0]))
    assert caught.value.code == "model_not_found" and models.asked == []


def test_a_canary_needs_a_scorer_that_both_versions_have() -> None:
    student = fake_student()
    of_trained, of_heldout = (
        replace(student, scorers={name: student.scorers[name]}) for name in ("trained", "heldout")
    )
    models, promoted = Models(), {"cats": "1"}
    models.choice = Choice({ONE: Served(of_trained, len), TWO: Served(of_heldout, len)}, promoted)
    with pytest.raises(Conflict, match="cats/2 has no scorer that 1 has: there is nothing to compare them by"):
        act(models, "start_canary", TWO, *CANARY)
    assert models.asked == []
    models.choice = Choice({ONE: Served(of_trained, len), TWO: Served(student, len)}, promoted)
    assert act(models, "start_canary", TWO, *CANARY) is RUNNING
