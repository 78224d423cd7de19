"""When a model may serve, and when it has been unloaded: with several workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.errors import StartupError
from service.models import controller as controller_module
from service.models.choice import Choice, Served
from service.models.controller import ModelController, SingleModel, Version
from service.models.folder import Folder, Name
from service.models.registry import Entry, ModelRegistry, ModelState, ModelStates
from service.quality.canary import Canary, Decision, Plan, Sums, Verdict
from service.queue.producer import Producer
from service.queue.status import WorkerState
from service.settings import Settings
from student.bundle import BundleError
from student.runtimes.fake import fake_student

NAME = "cats/1"


def worker(
    *models: str, refused: str = "", state: WorkerState = WorkerState.READY, attempt: str = "try"
) -> Any:  # fmt: skip
    refusals = {NAME: {"attempt": attempt, "reason": refused}} if refused else {}
    return SimpleNamespace(models=models, refused=refusals, state=state)


def moves(runner: asyncio.Runner, state: ModelState, workers: Sequence[Any]) -> list[ModelState]:
    """What the controller makes of a model in this state when these workers report."""
    made: list[ModelState] = []

    async def read() -> ModelStates:
        return ModelStates({NAME: Entry(state, "try")})

    async def transition(name: str, before: Sequence[str], after: Entry) -> bool:
        made.append(after.state)
        return False

    async def nothing(*_: object) -> None:
        pass

    async def all_workers() -> Sequence[Any]:
        return workers

    registry = SimpleNamespace(read=read, transition=transition, init=nothing, promote_first=nothing)
    folder = SimpleNamespace(newest=list, names=list)
    producer = SimpleNamespace(workers=all_workers)
    controller = ModelController(
        Settings(runtime="fake"), cast(Folder, folder), cast(ModelRegistry, registry), cast(Producer, producer)
    )
    runner.run(controller.refresh())
    return made


@pytest.mark.parametrize(
    ("state", "workers", "after"),
    [
        (ModelState.LOADING, [worker(), worker()], []),
        (ModelState.LOADING, [worker(NAME), worker()], []),
        (ModelState.LOADING, [worker(NAME), worker(NAME)], [ModelState.SERVING]),
        (ModelState.LOADING, [worker(NAME), worker(refused="No room.")], [ModelState.REFUSED]),
        (ModelState.LOADING, [worker(NAME), worker(refused="No room.", attempt="the one before")], []),
        (ModelState.LOADING, [worker(NAME), worker(state=WorkerState.PAUSED)], []),
        (ModelState.LOADING, [worker(NAME), worker(state=WorkerState.LOADING)], [ModelState.SERVING]),
        (ModelState.LOADING, [worker(refused="No room.", state=WorkerState.LOADING)], [ModelState.REFUSED]),
        (ModelState.LOADING, [], []),
        (ModelState.UNLOADING, [worker(NAME), worker()], []),
        (ModelState.UNLOADING, [worker(), worker()], [ModelState.UNLOADED]),
        (ModelState.UNLOADING, [], []),
    ],
)
def test_a_model_moves_on_when_every_worker_has(
    runner: asyncio.Runner, state: ModelState, workers: list[Any], after: list[ModelState]
) -> None:
    assert moves(runner, state, workers) == after


class Registered:
    """A controller over a registry that answers ``states``, and all that it asks of it."""

    def __init__(self, states: ModelStates, *found: str, workers: Sequence[Any] = ()) -> None:
        self.states, self.workers = states, workers
        self.asked: list[tuple[Any, ...]] = []
        names = [Name.of(name) for name in found]
        registry = SimpleNamespace(
            read=self._read,
            init=self._heard("init", None),
            transition=self._heard("transition", True),
            promote_first=self._heard("promote_first", None),
            end_canary=self._heard("end_canary", "over"),
            sums=self._heard("sums", Sums(pairs=7)),
        )
        folder = SimpleNamespace(newest=lambda: names, names=lambda: names, student=self._student)
        producer = SimpleNamespace(workers=self._workers)
        self.controller = ModelController(
            Settings(runtime="fake"), cast(Folder, folder), cast(ModelRegistry, registry), cast(Producer, producer)
        )

    async def _read(self) -> ModelStates:
        return self.states

    async def _workers(self) -> Sequence[Any]:
        return self.workers

    def _heard(self, verb: str, answer: Any) -> Any:
        async def hear(*args: Any) -> Any:
            self.asked.append((verb, *args))
            return answer

        return hear

    def _student(self, name: Name) -> Any:
        raise BundleError("its files are elsewhere")

    def of(self, verb: str) -> list[tuple[Any, ...]]:
        return [tuple(args) for said, *args in self.asked if said == verb]


def test_the_first_process_has_the_newest_version_of_every_unregistered_model_loaded(runner: asyncio.Runner) -> None:
    around = Registered(ModelStates({"dogs/1": Entry(ModelState.SERVING)}), "cats/2", "dogs/5")
    runner.run(around.controller.refresh())
    runner.run(around.controller.refresh())
    ((fresh,),) = around.of("init")
    assert {name: entry.state for name, entry in fresh.entries.items()} == {"cats/2": ModelState.LOADING}
    assert len(fresh.entries["cats/2"].attempt) == 16, "and once"


def test_a_server_that_lost_its_data_is_told_what_was_known(runner: asyncio.Runner) -> None:
    known = ModelStates({NAME: Entry(ModelState.SERVING)}, {"cats": "1"})
    around = Registered(known, "cats/2")
    runner.run(around.controller.refresh())
    around.states = ModelStates()
    runner.run(around.controller.refresh())
    assert around.of("init")[-1] == (known,)


def test_a_version_is_asked_for_from_the_states_that_it_can_be_loaded_from(runner: asyncio.Runner) -> None:
    around = Registered(ModelStates({NAME: Entry(ModelState.SERVING)}))
    runner.run(around.controller.load(Name.of(NAME)))
    ((name, before, entry),) = around.of("transition")
    assert name == NAME and set(before) == {"none", "refused", "unloaded", "unloading"}
    assert entry.state == ModelState.LOADING and len(entry.attempt) == 16


def test_the_first_version_that_is_served_becomes_the_latest(runner: asyncio.Runner) -> None:
    around = Registered(ModelStates({NAME: Entry(ModelState.LOADING, "try")}), workers=[worker(NAME)])
    runner.run(around.controller.refresh())
    assert around.of("transition") == [(NAME, [ModelState.LOADING], Entry(ModelState.SERVING, "try"))]
    assert around.of("promote_first") == [("cats", "1")]


def test_a_version_says_its_state_and_who_holds_it(runner: asyncio.Runner) -> None:
    states = ModelStates({NAME: Entry(ModelState.REFUSED, "try", "no room"), "dogs/3": Entry(ModelState.UNLOADED)})
    holds, other = worker(NAME), worker()
    around = Registered(states, "cats/1", "cats/2", workers=[holds, other])
    runner.run(around.controller.refresh())
    assert around.controller.versions() == [
        Version(Name("cats", "1"), "refused", "no room", False, (holds,)),
        Version(Name("cats", "2"), "available", "", False, ()),
        Version(Name("dogs", "3"), "unloaded", "", False, ()),
    ]


SERVED = {"cats/1": Entry(ModelState.SERVING), "cats/2": Entry(ModelState.SERVING)}
CHANGED = ("stopped", "the versions that are served have changed")


@pytest.mark.parametrize(
    ("states", "end"),
    [
        (ModelStates(SERVED, {"cats": "1"}), None),
        (ModelStates(SERVED, {"cats": "2"}), CHANGED),
        (ModelStates({"cats/1": Entry(ModelState.SERVING)}, {"cats": "1"}), CHANGED),
        (ModelStates({**SERVED, "cats/2": Entry(ModelState.UNLOADING)}, {"cats": "1"}), CHANGED),
    ],
)
def test_a_canary_goes_on_while_its_two_versions_are_served(
    runner: asyncio.Runner, states: ModelStates, end: tuple[str, str] | None
) -> None:
    canary = Canary("cats", "1", "2", "e", 0.05, Plan())
    around = Registered(replace(states, canaries={"cats": canary}))
    runner.run(around.controller.refresh())
    assert around.of("end_canary") == ([(canary, *end)] if end else [])
    assert runner.run(around.controller.canaries()) == [(canary, Sums(pairs=7))]


def test_a_canary_that_is_over_is_judged_no_more(runner: asyncio.Runner) -> None:
    over = Canary("cats", "1", "2", "e", 0.05, Plan(), state="stopped")
    around = Registered(ModelStates(SERVED, {"cats": "2"}, {"cats": over}))
    runner.run(around.controller.refresh())
    assert around.of("end_canary") == [] and around.of("sums") == []


def test_what_this_process_cannot_score_it_does_not_promote(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = Canary("cats", "1", "2", "e", 0.05, Plan())
    around = Registered(ModelStates(SERVED, {"cats": "1"}, {"cats": canary}))
    monkeypatch.setattr(controller_module, "judge", lambda *_: Verdict(Decision.PROMOTE, "all is well"))
    runner.run(around.controller.refresh())
    assert around.of("end_canary") == [], "its bundles cannot be read here"
    monkeypatch.setattr(controller_module, "judge", lambda *_: Verdict(Decision.ROLL_BACK, "it is worse"))
    runner.run(around.controller.refresh())
    assert around.of("end_canary") == [(canary, "rolled_back", "it is worse")]


def test_a_canary_is_judged_by_the_scorers_that_both_versions_have(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = Canary("cats", "1", "2", "e", 0.05, Plan(margin=0.3))
    around = Registered(ModelStates(SERVED, {"cats": "1"}, {"cats": canary}))
    student = fake_student()
    alone = replace(student, scorers={"trained": student.scorers["trained"]})
    asked: list[tuple[Any, ...]] = []

    def judge(*args: Any) -> Verdict:
        asked.append(args)
        return Verdict(Decision.PROMOTE, "all is well")

    monkeypatch.setattr(controller_module, "judge", judge)
    both = {Name("cats", "1"): Served(student, len), Name("cats", "2"): Served(alone, len)}
    monkeypatch.setattr(around.controller, "choice", Choice(both, {"cats": "1"}, {"cats": canary}))
    runner.run(around.controller.refresh())
    assert asked == [(Sums(pairs=7), Plan(margin=0.3), frozenset({"trained"}))]
    assert around.of("end_canary") == [(canary, "promoted", "all is well")]


@pytest.mark.parametrize(
    ("state", "pause_s"),
    [
        (ModelState.LOADING, controller_module.BUSY_POLL_S),
        (ModelState.UNLOADING, controller_module.BUSY_POLL_S),
        (ModelState.SERVING, controller_module.POLL_EVERY_S),
    ],
)
def test_it_looks_more_often_while_something_moves(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, state: ModelState, pause_s: float
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    around = Registered(ModelStates({NAME: Entry(state)}))
    monkeypatch.setattr(controller_module, "asyncio", SimpleNamespace(sleep=sleep, to_thread=asyncio.to_thread))
    runner.run(around.controller.poll())
    assert slept == [pause_s]


def test_every_version_that_all_workers_hold_moves_on_at_once(runner: asyncio.Runner) -> None:
    states = {f"{id}/1": Entry(ModelState.LOADING, "try") for id in ("ants", "bees", "cats")}
    around = Registered(ModelStates(states), workers=[worker("ants/1", "cats/1"), worker("cats/1", "ants/1", "bees/1")])
    runner.run(around.controller.refresh())
    assert [name for name, *_ in around.of("transition")] == ["ants/1", "cats/1"]
    assert around.of("promote_first") == [("ants", "1"), ("cats", "1")]


def test_each_canary_is_judged_by_itself(runner: asyncio.Runner) -> None:
    over, goes_on, ends = (
        Canary(model, "1", "2", f"of {model}", 0.05, Plan(), state=state)
        for model, state in (("ants", "stopped"), ("bees", "running"), ("cats", "running"))
    )
    served = {f"{id}/{version}": Entry(ModelState.SERVING) for id in ("ants", "bees", "cats") for version in "12"}
    promoted = {"ants": "1", "bees": "1", "cats": "2"}
    around = Registered(ModelStates(served, promoted, {canary.model: canary for canary in (over, goes_on, ends)}))
    runner.run(around.controller.refresh())
    assert around.of("end_canary") == [(ends, *CHANGED)] and around.of("sums") == [(goes_on,), (ends,)]


def test_what_is_served_is_opened_once_with_its_sizes_and_what_is_promoted_is_followed(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def student(name: Name) -> Any:
        opened.append(str(name))
        if name.id == "dogs":
            raise BundleError("its files are elsewhere")
        return replace(fake_student(), id=name.id, version=name.version)

    states = ModelStates({**SERVED, "dogs/1": Entry(ModelState.SERVING), "eels/1": Entry(ModelState.LOADING)}, {})
    around = Registered(states)
    around.controller.folder = cast(
        Folder, SimpleNamespace(newest=list, names=list, student=student, bundle=lambda name: str(name))
    )
    monkeypatch.setattr(controller_module, "sizes_of", lambda bundle, found: ((96, 32),) if bundle == "cats/1" else ())
    run = runner.run
    run(around.controller.refresh())
    first = around.controller.choice
    assert {str(name): found.sizes for name, found in first.served.items()} == {"cats/1": ((96, 32),), "cats/2": ()}
    assert first.served[Name("cats", "1")].count_tokens("two words") == 2 and first.latest("cats") == "2"
    assert opened == ["cats/1", "cats/2", "dogs/1"]
    around.states = ModelStates(SERVED, {"cats": "1"})
    run(around.controller.refresh())
    assert around.controller.choice.latest("cats") == "1"
    canary = Canary("cats", "1", "2", "e", 0.05, Plan())
    around.states = ModelStates(SERVED, {"cats": "1"}, {"cats": canary})
    run(around.controller.refresh())
    assert around.controller.choice.canary(Name("cats", "1")) == (canary, first.served[Name("cats", "2")])
    around.states = ModelStates({"cats/2": Entry(ModelState.SERVING)}, {"cats": "2"})
    run(around.controller.refresh())
    assert list(around.controller.choice.served) == [Name("cats", "2")] and len(opened) == 3


def test_the_one_student_is_served_in_the_sizes_of_its_bundle_and_needs_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    student = fake_student()
    monkeypatch.setattr(controller_module, "open_student", lambda settings: student)
    monkeypatch.setattr(controller_module, "sizes_of", lambda bundle, found: ((96, 32),) if bundle == tmp_path else ())
    monkeypatch.setattr(controller_module, "counter_of", lambda bundle, found, settings: len)
    served = SingleModel(Settings(runtime="onnx", model=tmp_path)).choice.default()
    assert served == Served(student, len, ((96, 32),))
    fake = SingleModel(Settings(runtime="fake", model=tmp_path)).choice.default()
    assert fake == Served(student, len), "which has none on disk"

    def without(*_: Any) -> Any:
        raise BundleError("it has no tokenizer")

    monkeypatch.setattr(controller_module, "counter_of", without)
    with pytest.raises(StartupError, match="^it has no tokenizer.$"):
        SingleModel(Settings(runtime="onnx", model=tmp_path))


def test_files_that_cannot_be_read_here_are_told_once_and_read_once_they_are_there(
    runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks twice a second: a folder that is gone would fill the log."""
    around, reason = Registered(ModelStates({NAME: Entry(ModelState.SERVING)}, {})), ["its files are elsewhere"]

    def student(name: Name) -> Any:
        if reason[0]:
            raise BundleError(reason[0])
        return replace(fake_student(), id=name.id, version=name.version)

    around.controller.folder = cast(
        Folder, SimpleNamespace(newest=list, names=list, student=student, bundle=lambda name: Path(str(name)))
    )

    def looks(times: int) -> list[str]:
        caplog.clear()
        for _ in range(times):
            runner.run(around.controller.refresh())
        return [message.rpartition(": ")[2] for message in caplog.messages]

    assert looks(3) == ["its files are elsewhere"]
    reason[0] = "they are broken"
    assert looks(2) == ["they are broken"]
    reason[0] = ""
    assert looks(2) == [] and list(around.controller.choice.served) == [Name.of(NAME)]
    around.controller.choice, reason[0] = Choice({}), "they are broken"
    assert looks(2) == ["they are broken"], "again, since it was well meanwhile"
