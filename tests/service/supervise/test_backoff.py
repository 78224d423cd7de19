"""A process that dies again and again is started after longer and longer pauses; one that ran steadily at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.queue.status import DRAINED
from service.supervise import supervisor
from service.supervise.supervisor import FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_AFTER_S, Child, Supervisor


class Scene:
    """A supervisor whose child dies as soon as it is started, and a clock that it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.starts: list[float] = []
        self.taken_back: list[str] = []
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(Supervisor, "_spawn", lambda _, child: self._spawn(child))
        monkeypatch.setattr(Supervisor, "_write_run_file", lambda _: None)
        monkeypatch.setattr(Supervisor, "_take_back", lambda _, worker: self.taken_back.append(worker))
        self.supervisor: Any = Supervisor.__new__(Supervisor)
        self.child = Child("worker", name="w")

    def _spawn(self, child: Child) -> None:
        self.starts.append(self.now_s)
        child.started = self.now_s
        child.process = SimpleNamespace(pid=1, poll=lambda: 1)  # type: ignore[assignment]

    def pass_(self, seconds: float, step_s: float = 0.05) -> None:
        for _ in range(round(seconds / step_s)):
            self.supervisor._restart(self.child)
            self.now_s += step_s


def test_pauses_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.pass_(8.0)
    pauses = [after - before for before, after in zip(scene.starts, scene.starts[1:], strict=False)]
    wanted = [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**k) for k in range(len(pauses))]
    assert len(pauses) > 6 and pauses == pytest.approx(wanted, abs=0.11)


def test_one_that_ran_steadily_is_started_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.pass_(8.0)
    scene.child.process = SimpleNamespace(pid=1, poll=lambda: None)  # type: ignore[assignment]
    scene.pass_(2 * STEADY_AFTER_S)
    died_s = scene.now_s
    scene.child.process = SimpleNamespace(pid=1, poll=lambda: 1)  # type: ignore[assignment]
    scene.pass_(1.0)
    assert scene.starts[-1] > died_s or scene.starts[-2] > died_s
    assert min(start for start in scene.starts if start >= died_s) - died_s <= FIRST_PAUSE_S + 0.11
    assert scene.taken_back and set(scene.taken_back) == {"w"}


@pytest.mark.parametrize(
    ("role", "code", "started", "taken_back"),
    [
        ("worker", DRAINED, False, set()),
        ("worker", 1, True, {"w"}),
        ("api", 1, True, set()),
        ("api", DRAINED, True, set()),
    ],
)
def test_who_has_ended_is_listed_no_more_and_a_worker_that_was_drained_is_not_started_again(
    role: str, code: int, started: bool, taken_back: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, listed = Scene(monkeypatch), list[bool]()
    monkeypatch.setattr(Supervisor, "_write_run_file", lambda _: listed.append(scene.child.process is not None))
    scene.child = Child(role, name="w", process=SimpleNamespace(pid=1, poll=lambda: code))  # type: ignore[arg-type]
    scene.pass_(FIRST_PAUSE_S + 0.04, 0.01)
    assert (bool(scene.starts), {*listed}, {*scene.taken_back}) == (started, {False}, taken_back)
    if not started:
        scene.pass_(1e6, 1e5)
        assert scene.starts == []
