"""The list of mutants fits the code, and the tool tells a fault that is noticed from one that is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import run as tool
from tests.mutants.catalogue import ListError, Mutant, read_list

ROOT = Path(__file__).resolve().parents[1]
ENTRY = """
[[mutant]]
name = "{name}"
file = "{file}"
old = "{old}"
new = "{new}"
tests = ["{test}"]
"""


def project(folder: Path, **changes: str) -> Path:
    """A project of one function and one test, which notices some faults; returns its list with one entry."""
    (folder / "half.py").write_text("def half(x):\n    '''No test looks at this.'''\n    return x / 2\n")
    (folder / "test_half.py").write_text(
        "import time\nfrom half import half\n\ndef test_half():\n    assert half(4) == 2\n"
    )
    values = {"name": "n", "file": "half.py", "old": "x / 2", "new": "x / 3", "test": "test_half.py::test_half"}
    (folder / "list.toml").write_text(ENTRY.format(**{**values, **changes}))
    return folder / "list.toml"


def test_the_projects_list_fits_its_code() -> None:
    mutants = read_list(ROOT)
    assert len(mutants) >= 60
    assert {mutant.file.split("/")[0] for mutant in mutants} >= {"student", "rewards", "training", "service", "fewstep"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "third.py"}, "there is no file third.py"),
        ({"old": "x * 2"}, "half.py holds the old text 0 times"),
        ({"old": "x"}, "half.py holds the old text 2 times"),
        ({"new": "x / 2"}, "the new text is the old one"),
        ({"new": "x / )"}, "line 3 would not be Python"),
        ({"test": "test_half.py::test_third"}, "there is no test test_half.py::test_third"),
        ({"test": "test_third.py"}, "there is no test test_third.py"),
    ],
)
def test_an_entry_that_does_not_fit_is_an_error(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(ListError, match=f"^n: {reason}"):
        read_list(tmp_path, project(tmp_path, **changes))


def test_a_name_stands_once(tmp_path: Path) -> None:
    file = project(tmp_path)
    file.write_text(2 * file.read_text())
    with pytest.raises(ListError, match="^n: the name stands twice$"):
        read_list(tmp_path, file)


@pytest.mark.parametrize(
    ("changes", "ended"),
    [
        ({}, tool.KILLED),
        ({"old": "No test", "new": "A test"}, tool.LIVED),
        ({"old": "return x", "new": "import third; return x"}, tool.KILLED),
        ({"old": "return x", "new": "import time; time.sleep(60); return x"}, tool.LATE),
    ],
)
def test_what_becomes_of_a_mutant(tmp_path: Path, changes: dict[str, str], ended: str) -> None:
    (mutant,) = read_list(tmp_path, project(tmp_path, **changes))
    text = (tmp_path / "half.py").read_text()
    patience_s = 3.0 if ended == tool.LATE else 60.0
    assert tool.judge(tmp_path, mutant, patience_s) == ended
    assert (tmp_path / "half.py").read_text() == text


def test_tests_that_run_nothing_say_nothing_of_a_mutant(tmp_path: Path) -> None:
    mutant = Mutant("n", "half.py", "x / 2", "x / 3", ("test_half.py::test_third",))
    project(tmp_path)
    with pytest.raises(tool.CannotRun, match="n: pytest ended with 4"):
        tool.judge(tmp_path, mutant, 60.0)


def test_tests_that_are_skipped_say_nothing_of_a_mutant(tmp_path: Path) -> None:
    (mutant,) = read_list(tmp_path, project(tmp_path))
    (tmp_path / "test_half.py").write_text("import pytest\n\ndef test_half():\n    pytest.skip('not here')\n")
    with pytest.raises(tool.CannotRun, match="1 skipped"):
        tool.judge(tmp_path, mutant, 60.0)


def test_tests_that_fail_without_a_fault_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants = read_list(tmp_path, project(tmp_path))
    (tmp_path / "half.py").write_text("def half(x):\n    return x / 4\n")
    with pytest.raises(tool.CannotRun, match="Without any fault the tests fail: FAILED test_half.py::test_half"):
        tool.prove(tmp_path, mutants, tool.Results("k", {}, []), 60.0)


def test_results_are_gone_on_with_for_the_same_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "out" / "mutants.json")
    tool.Results("a", {"n": tool.LIVED}, ["t"]).keep()
    assert tool.Results.read("a").known == {"n": tool.LIVED} and tool.Results.read("b").known == {}


def test_the_command_says_whether_the_list_fits() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants.run", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "mutants fit the code" in done.stdout
