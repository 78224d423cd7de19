"""Figures beside a run's own log, and a run that goes on where nobody takes them; a student's way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from training import hub
from training.steplog import StepLog, read_log
from training.tracker import Remote, remote, tracking


class Kept:
    """In accelerate's form."""

    seen: list[tuple[str, Any]] = []

    def __init__(self, run_name: str) -> None:
        self.seen.append(("run", run_name))

    def start(self) -> None:
        self.seen.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append(("log", (values, step)))

    def finish(self) -> None:
        self.seen.append(("finish", None))


class Away(Kept):
    def log(self, values: dict[str, float], step: int) -> None:
        raise ConnectionError("no route to host\nand more")


def test_a_tracker_is_given_what_the_log_has_by_finished_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "seen", [])
    monkeypatch.setattr(tracking, "MLflowTracker", Kept)
    path = tmp_path / "mine" / "run" / "log.jsonl"
    assert remote("tensorboard", path, {}, print) is None
    log = StepLog(path, 0, remote("mlflow", path, {"steps": 2}, print))
    log.write(-1, heldout=0.5)
    log.write(0, loss=1.5, bad=float("nan"))
    log.close()
    assert Kept.seen[:3] == [("run", "mine"), ("start", None), ("config", {"steps": 2})]
    assert Kept.seen[3:] == [("log", ({"heldout": 0.5}, 0)), ("log", ({"loss": 1.5}, 1)), ("finish", None)]


def test_a_tracker_that_is_away_is_said_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "WandBTracker", Away)
    said: list[str] = []
    path = tmp_path / "mine" / "run" / "log.jsonl"
    log = StepLog(path, 0, Remote("wandb", "mine", {}, said.append))
    for step in range(3):
        log.write(step, loss=1.0)
    log.close()
    assert said == ["tracker wandb cannot be reached, and the run continues without it: no route to host"]
    assert len(read_log(path)) == 3


class Api:
    calls: list[tuple[str, Any]] = []
    refuses = False

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        if self.refuses:
            raise HfHubHTTPError("403 Forbidden: not yours", response=_response())

    def upload_folder(self, **arguments: Any) -> None:
        self.calls.append(("upload", arguments))


def _away(*_: Any, **__: Any) -> None:
    import httpx

    raise httpx.ConnectError("no route to host\nand more")


def _response() -> Any:
    import httpx

    return httpx.Response(403, request=httpx.Request("POST", "http://localhost/api"))


def test_the_adapter_is_pushed_in_place_of_the_pipeline_and_the_runs_files_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    assert hub.push(tmp_path, "me/student") == "the student is on the hub as me/student"
    (tmp_path / "adapter").mkdir()
    hub.push(tmp_path, "me/student")
    whole, lora = (arguments for _, arguments in Api.calls)
    assert whole["allow_patterns"] is None and "adapter/*" in lora["allow_patterns"]
    assert all(one["ignore_patterns"] == ["run/*"] and one["repo_id"] == "me/student" for one in (whole, lora))
    assert not any("transformer" in pattern or pattern == "*" for pattern in lora["allow_patterns"])


def test_a_hub_that_refuses_is_said_and_the_student_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(Api, "refuses", True)
    sentence = hub.push(tmp_path, "me/student")
    assert sentence.startswith("the student could not be pushed to me/student: 403 Forbidden")
    assert sentence.endswith(f"it is complete in {tmp_path}")
    monkeypatch.setattr(Api, "create_repo", _away)
    assert "could not be pushed to me/student: no route to host; it is" in hub.push(tmp_path, "me/student")
