"""The list of mutants fits the code, and the tool tells a fault that is noticed from one that is not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import judge as judging
from tests.mutants import run as tool
from tests.mutants.catalogue import ListError, Mutant, read_list
from tests.mutants.judge import KILLED, LATE, LIVED, UNKNOWN, CannotRun, Verdict, judge

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
    ("changes", "verdict"),
    [
        ({}, Verdict(KILLED, ("test_half.py::test_half",))),
        ({"old": "No test", "new": "A test"}, Verdict(LIVED)),
        ({"old": "def half", "new": "def third", "test": "test_half.py"}, Verdict(KILLED, ("test_half.py",))),
        ({"old": "def half", "new": "def third"}, Verdict(KILLED, ("test_half.py::test_half",))),
        ({"old": "return x", "new": "import time; time.sleep(60); return x"}, Verdict(LATE)),
    ],
)
def test_what_becomes_of_a_mutant(tmp_path: Path, changes: dict[str, str], verdict: Verdict) -> None:
    (mutant,) = read_list(tmp_path, project(tmp_path, **changes))
    text = (tmp_path / "half.py").read_text()
    assert judge(tmp_path, mutant, 10.0 if verdict.ended == LATE else 60.0) == verdict
    assert (tmp_path / "half.py").read_text() == text


def test_tests_that_take_as_long_without_the_fault_say_nothing_of_a_mutant(tmp_path: Path) -> None:
    (mutant,) = read_list(tmp_path, project(tmp_path))
    (tmp_path / "test_half.py").write_text("import time\n\ndef test_half():\n    time.sleep(60)\n")
    with pytest.raises(CannotRun, match="n: its tests take longer than 1 s without it too"):
        judge(tmp_path, mutant, 1.0)


def test_tests_that_run_nothing_say_nothing_of_a_mutant(tmp_path: Path) -> None:
    mutant = Mutant("n", "half.py", "x / 2", "x / 3", ("test_half.py::test_third",))
    project(tmp_path)
    with pytest.raises(CannotRun, match="n: pytest ended with 4"):
        judge(tmp_path, mutant, 60.0)


def test_tests_that_are_skipped_say_nothing_of_a_mutant(tmp_path: Path) -> None:
    (mutant,) = read_list(tmp_path, project(tmp_path))
    (tmp_path / "test_half.py").write_text("import pytest\n\ndef test_half():\n    pytest.skip('not here')\n")
    with pytest.raises(CannotRun, match="1 skipped"):
        judge(tmp_path, mutant, 60.0)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mutant]:
    """The tool on a project of its own: three faults that are noticed by one test each, and one by none."""
    project(tmp_path)
    entries = [
        ENTRY.format(name=f"n{k}", file="half.py", old="x / 2", new=f"x / {k + 3}", test="test_half.py::test_half")
        for k in range(3)
    ]
    entries.append(ENTRY.format(name="unseen", file="half.py", old="No test", new="A", test="test_half.py"))
    (tmp_path / "list.toml").write_text("".join(entries))
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "out" / "mutants.json")
    monkeypatch.setattr(tool, "tracked", lambda: ["half.py", "test_half.py"])
    return read_list(tmp_path, tmp_path / "list.toml")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each call of pytest."""
    calls: list[list[str]] = []
    real = judging.pytest

    def pytest(copy: Path, arguments: list[str], patience_s: float) -> subprocess.CompletedProcess[str]:
        calls.append(list(arguments))
        return real(copy, arguments, patience_s)

    monkeypatch.setattr(judging, "pytest", pytest)
    return calls


def test_each_is_tried_and_what_noticed_it_is_run_once_without_it(
    own: list[Mutant], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    noticed = Verdict(KILLED, ("test_half.py::test_half",))
    assert tool.run(own, 2, 60.0) == {**dict.fromkeys(("n0", "n1", "n2"), noticed), "unseen": Verdict(LIVED)}
    assert len(calls) == 5 and calls[-1] == ["test_half.py::test_half"]
    assert tool.run(own, 2, 60.0)["unseen"] == Verdict(LIVED) and len(calls) == 5


def test_one_that_cannot_be_judged_costs_the_others_nothing(
    own: list[Mutant], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own[1] = replace(own[1], tests=("test_half.py::test_third",))
    ended = tool.run(own, 1, 60.0)
    assert {name: verdict.ended for name, verdict in ended.items()} == {
        "n0": KILLED, "n1": UNKNOWN, "n2": KILLED, "unseen": LIVED,
    }  # fmt: skip
    assert tool._say(ended, 4) == 1
    said = capsys.readouterr().out
    assert "2 of 4 mutants are noticed" in said and f"{UNKNOWN}: n1" in said


def test_tests_that_fail_without_a_fault_are_an_error_in_the_end(
    own: list[Mutant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_half.py").write_text("def test_half():\n    assert False\n")
    for _ in range(2):
        with pytest.raises(CannotRun, match="Without any fault the tests fail: FAILED test_half.py::test_half"):
            tool.run(own, 1, 60.0)


def test_an_interrupted_run_tries_each_once(own: list[Mutant], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    clock = iter(range(1000))
    monkeypatch.setattr(tool.time, "monotonic", lambda: float(next(clock)))
    assert 0 < len(some := tool.run(own, 1, 60.0, minutes=5 / 60)) < 4  # each look at the clock is a second later
    tried = [call for call in calls if "-x" in call]
    rest = tool.run(own, 1, 60.0)
    assert len(rest) == 4 and some.items() <= rest.items()
    assert len([call for call in calls if "-x" in call]) == 4 > len(tried)


def test_results_are_gone_on_with_for_the_same_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "out" / "mutants.json")
    known = {"n": Verdict(KILLED, ("t::a", "t::b"))}
    tool.Results("a", known, ["t::a"]).keep()
    assert tool.Results.read("a").known == known and tool.Results.read("a").unproven() == ["t::b"]
    assert tool.Results.read("b").known == {}


def test_the_exit_status_follows_the_share(capsys: pytest.CaptureFixture[str]) -> None:
    ended = {f"n{k}": Verdict(KILLED) for k in range(19)} | {"unseen": Verdict(LIVED)}
    assert tool._say(ended, 30) == 0
    said = capsys.readouterr().out
    assert "19 of 20 mutants are noticed (95%; 95% are needed)\n10 are left: the same command goes on" in said
    assert said.endswith("lived: unseen\n")
    assert tool._say({**ended, "other": Verdict(LIVED)}, 21) == 1 and "are left" not in capsys.readouterr().out


def test_the_command_says_whether_the_list_fits() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants.run", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "mutants fit the code" in done.stdout
