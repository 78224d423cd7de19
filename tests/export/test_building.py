"""The process that builds an engine, whichever library it has: its messages, its memory and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export import builder
from export.builder import build_engine, resident_bytes
from export.engine import Order
from export.errors import ExportError

ENDING = "building step needs more than 1.5 GiB of memory: allow more with --memory-gb"


def order(folder: Path) -> Order:
    return Order("tensorrt", str(folder / "a.onnx"), str(folder / "step.engine"), {}, (), 1, 1)


def python(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What is run in the place of the builder; it gets the module's name and the order's file."""
    script = folder / "python"
    script.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    script.chmod(0o755)
    monkeypatch.setattr(builder.sys, "executable", str(script))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_build_says_its_phases_and_leaves_its_engine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = json.dumps({"plan": "step.engine", "bytes": 7})
    python(
        tmp_path, monkeypatch, 'echo "$@" > asked', f'cat "$3" > "{tmp_path}/order"', "echo 'the library says hello'",
        "echo '{\"phase\": \"one\"}'", "echo '{\"phase\": \"two\", \"steps\": 3}'", "echo noise >&2", f"echo '{last}'",
        f'echo "$1 $2" > "{tmp_path}/argv"', "rm -f asked",
    )  # fmt: skip
    said: list[str] = []
    assert build_engine(order(tmp_path), 2**40, said.append, tmp_path) == {"plan": "step.engine", "bytes": 7}
    assert said == ["  one", "  two"] and left(tmp_path) == ["argv", "order", "python"]
    assert (tmp_path / "argv").read_text() == "-m export.engine\n"
    assert Order(**json.loads((tmp_path / "order").read_text())) == replace(order(tmp_path), profiles=[])


def test_what_the_library_refused_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(tmp_path, monkeypatch, 'echo \'{"error": "it cannot read a.onnx"}\'', "exit 1")
    with pytest.raises(ExportError, match=r"^it cannot read a\.onnx$"):
        build_engine(order(tmp_path), 2**40, lambda text: None, tmp_path)


@pytest.mark.parametrize(("noise", "said"), [("echo first >&2; echo last >&2", "last"), ("true", "it printed nothing")])
def test_a_process_that_ends_without_a_plan_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: str, said: str
) -> None:
    python(tmp_path, monkeypatch, 'echo \'{"phase": "one"}\'', noise, "exit 3")
    with pytest.raises(ExportError, match=f"^the process that built step died with status 3: {said}$"):
        build_engine(order(tmp_path), 2**40, lambda text: None, tmp_path)


def test_a_build_beyond_its_memory_is_ended_whatever_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def resident(pid: int) -> int:
        asked.append(pid)
        return 3 * 2**29 + (len(asked) > 2)

    monkeypatch.setattr(builder, "resident_bytes", resident)
    going_on = f"import pathlib, time; time.sleep(20); pathlib.Path({str(tmp_path / 'over')!r}).touch()"
    python(tmp_path, monkeypatch, f'echo $$ > "{tmp_path}/pid"', f'exec "{sys.executable}" -c "{going_on}"')
    with pytest.raises(ExportError, match=f"^{ENDING}$"):
        build_engine(order(tmp_path), 3 * 2**29, lambda text: None, tmp_path)
    pid = int((tmp_path / "pid").read_text())
    assert asked == [pid] * 3 and not Path(f"/proc/{pid}").exists(), "exactly the limit is allowed"
    assert not (tmp_path / "over").exists(), "it was ended, not waited for"


def test_a_process_that_does_not_hear_is_killed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "GRACE_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "1\n"
    builder._end(child)
    assert child.returncode == -signal.SIGKILL and child.stdout.closed


def test_a_process_that_hears_is_only_asked(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True)
    builder._end(child)
    assert child.returncode == -signal.SIGTERM
    builder._end(child)  # once more changes nothing


def test_resident_memory_is_that_of_the_process() -> None:
    assert resident_bytes(2**22 + 1) == 0
    own = resident_bytes(os.getpid())
    pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert own == pytest.approx(pages, rel=0.2) and own > 10**6
