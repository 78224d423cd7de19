"""How a program ends: one sentence for what its user can fix, a traceback for the rest; signals; the time of a step."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from rewards.interface import RewardError
from student.bundle import BundleError
from student.families.family import SizeError
from training import endings, environment, timing
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.endings import LESS_MEMORY, one_sentence
from training.rundir import RunDirError, RunDiverged, RunStopped
from training.termination import sigterm
from training.timing import StepTimer


def ending(error: BaseException, **how: Any) -> tuple[int, str]:
    """The exit code and what is said."""
    with endings.console.capture() as captured, pytest.raises(typer.Exit) as ended:
        with one_sentence(**how):
            raise error
    return ended.value.exit_code, " ".join(captured.get().split())


@pytest.mark.parametrize(
    "kind", [ConfigError, RunDirError, RunDiverged, CheckpointError, BundleError, RewardError, SizeError]
)
def test_a_users_mistake_is_one_sentence(kind: type[Exception]) -> None:
    assert ending(kind("steps is [0]: accepted is 1 or more")) == (2, "steps is [0]: accepted is 1 or more")
    assert ending(kind("no"), code=3) == (3, "no")


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS"])
def test_what_the_disk_refuses_is_one_sentence(number: str) -> None:
    code = getattr(errno, number)
    assert ending(OSError(code, "the reason", "file")) == (2, "file cannot be read or written: the reason")
    assert ending(OSError(code, "the reason")) == (2, "a file cannot be read or written: the reason")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken"), ValueError("a bug"), KeyError("a bug"), RuntimeError()]
)
def test_what_only_a_developer_can_fix_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), one_sentence():
        raise error


def test_a_full_gpu_says_what_needs_less() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    code, said = ending(error, less_memory=LESS_MEMORY)
    assert code == 2 and said.startswith("the GPU is out of memory: compute.checkpointing=true, ")
    assert said.endswith(": CUDA out of memory")
    assert ending(torch.OutOfMemoryError()) == (2, "the GPU is out of memory")


def test_a_stop_is_no_failure_and_has_the_code_of_its_signal() -> None:
    assert ending(RunStopped("resumes from step 3")) == (143, "resumes from step 3")
    code, said = ending(KeyboardInterrupt())
    assert (code, said) == (130, "stopped: the same command resumes from the last checkpoint")
    assert ending(KeyboardInterrupt(), interrupted="gone") == (130, "gone")


def test_a_request_to_stop_is_noted_and_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    found: list[bool] = []

    def elsewhere() -> None:
        with sigterm() as asked:
            found.append(asked.is_set())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) is before, "only the main thread has signals"


def test_parts_of_a_step_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.5, 2.0, 2.25, 3.0, 7.00004])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))
    timer = StepTimer(torch.device("cpu"))
    for name in ("teacher", "student", "teacher"):
        with timer.part(name):
            pass
    assert timer.seconds() == {"teacher_s": 5.5, "student_s": 0.25}


def test_the_environment_names_no_path_no_host_and_no_user(tmp_path: Path) -> None:
    environment.write(tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert set(found) == {"code", "python", "system", "cpus", "threads", "gpus", "libraries"}
    assert set(found["libraries"]) == {
        "torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "tokenizers", "safetensors",
    }  # fmt: skip
    text = json.dumps(found)
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(environment.ROOT) not in text


def test_code_is_named_by_its_commit_and_by_whether_it_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"rev-parse": "0123456789ab", "status": ""}
    monkeypatch.setattr(environment, "_git", lambda command, *_: said[command])
    assert environment.code_version() == "0123456789ab"
    said["status"] = " M file"
    assert environment.code_version() == "0123456789ab+"

    def none(*_: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(environment, "_git", none)
    assert environment.code_version() == "unknown"
