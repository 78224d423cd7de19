"""The commands that measure a student: what each hands on of what it was asked for, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import adopt, adoption, card, measure, probe, within
from export import reference as referring
from export.adoption import check_room
from export.errors import ExportError
from export.measure import Measurement
from export.score import score
from rewards.serving import open_reward
from student.bundle import Scorer, Student, WithinPrompt, rewrite_student
from student.probe import read_probe
from student.runtimes.fake import FakeRuntime
from student.runtimes.options import Options
from tests import tiny

BUNDLE = Path("bundle")
STUDENT = tiny.student({})


def lines(folder: Path, count: int) -> tuple[Path, tuple[str, ...]]:
    texts = tuple(f"prompt {k}" for k in range(count))
    (folder / "prompts.txt").write_text("\n".join(texts))
    return folder / "prompts.txt", texts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is measured, in order."""
    found: list[Any] = []
    monkeypatch.setattr(measure, "add_scorers", lambda *given: (found.append(given), STUDENT)[1])
    monkeypatch.setattr(within, "add_within_prompt", lambda *given: (found.append(("within", *given)), STUDENT)[1])
    monkeypatch.setattr(card, "add_rewards_to_card", lambda *given: found.append(("card", *given)))
    return found


@pytest.mark.parametrize(("count", "images", "expected"), [(3, 0, 64), (70, 0, 70), (70, 9, 9)])
def test_rewards_are_scored_on_as_many_pictures_as_there_are_prompts_or_are_asked_for(
    count: int, images: int, expected: int, tmp_path: Path, asked: list[Any]
) -> None:
    rewrite_student(tmp_path, STUDENT)
    file, texts = lines(tmp_path, count)
    score(tmp_path, file, ["b,a", " a", "c:D"], images, 5, 2, "onnx", 3)
    (bundle, measured), spread = asked
    assert bundle == tmp_path and measured.say is not None
    assert replace(measured, say=print) == Measurement(("b", "a", "c:D"), texts, expected, "onnx", 3)
    assert spread == ("within", tmp_path, texts[:2], 5, "onnx", 3)


def test_what_is_not_asked_for_is_not_measured(tmp_path: Path, asked: list[Any]) -> None:
    rewrite_student(tmp_path, STUDENT)
    file, texts = lines(tmp_path, 20)
    score(tmp_path, file)
    assert asked == [("within", tmp_path, texts[:16], 8, "auto", 1)]
    asked.clear()
    score(tmp_path, file, ["a"], seeds=0)
    assert len(asked) == 1 and asked[0][1].rewards == ("a",)


def test_an_adopted_student_is_measured_by_the_rewards_that_it_lacks(asked: list[Any]) -> None:
    row = Scorer("scorers/a.onnx", 0.0, 1.0, "heldout", "s", "a")
    spread = {"4": WithinPrompt(8, 3, {"a": 1.0}, {}, {})}
    there = replace(STUDENT, scorers={"a": row})
    known = replace(there, within_prompt=spread)
    texts, repeated = [f"prompt {k}" for k in range(70)], ["prompt 0"]

    def measured(student: Student, names: tuple[str, ...], again: list[str], images: int = 0) -> list[Any]:
        asked.clear()
        adopt._measured(BUNDLE, student, names, texts, images, again, 5, 3)
        return [one[0] if isinstance(one[0], str) else one[1] for one in asked]

    assert measured(known, ("a",), repeated) == [], "all is known"
    assert measured(there, ("a",), repeated) == ["within"]
    assert asked == [("within", BUNDLE, repeated, 5, "auto", 3)]
    assert measured(there, ("a",), []) == []
    first, *rest = measured(known, ("a", "b", "c"), repeated)
    assert (first.rewards, first.prompts, first.images, first.runtime, first.threads) == (
        ("b", "c"), tuple(texts), 70, "auto", 3,
    )  # fmt: skip
    assert rest == ["card", "within"]
    first, *rest = measured(known, ("b",), [], images=12)
    assert first.images == 12 and rest == ["card"]
    with pytest.raises(ExportError, match="^images is 7"):
        measured(known, ("b",), [], images=7)


def test_a_distribution_is_measured_by_the_runtime_that_is_asked_for_on_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("student.runtimes.load.load", lambda *given: (asked.append(given), "opened")[1])
    monkeypatch.setattr(referring, "measure_reference", lambda *given: (asked.append(given), STUDENT)[1])
    (tmp_path / "prompts.txt").write_text("a\nb\na\n")
    referring.reference(BUNDLE, tmp_path / "prompts.txt", "torch", 3)
    assert asked == [(BUNDLE, "torch", 3, Options(open_reward)), (BUNDLE, "opened", ("a", "b"))]


def test_a_probe_is_measured_by_the_runtime_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    runtime = SimpleNamespace(name="torch")
    monkeypatch.setattr("student.runtimes.load.load", lambda *given: (asked.append(given), runtime)[1])
    monkeypatch.setattr(probe, "update_probe", lambda *given: (asked.append(given), SimpleNamespace(pairs=[1, 2]))[1])
    file, texts = lines(tmp_path, 3)
    probe.run(BUNDLE, "torch", file, 3)
    assert asked == [(BUNDLE, "torch", 3, Options(open_reward)), (BUNDLE, runtime, texts)]


def test_a_probe_keeps_what_other_machines_and_runtimes_found_and_its_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, found = FakeRuntime(), []
    for name, kind, prompts in (
        ("fake", "one", ["a", "b"]), ("fake", "two", ["others"]), ("more", "two", ["others"]), ("fake", "one", ["x"]),
    ):  # fmt: skip
        runtime.name = name
        monkeypatch.setattr(probe, "machine_kind", lambda name, kind=kind: f"{kind} for {name}")
        found.append(probe.update_probe(tmp_path, runtime, prompts))
    last = read_probe(tmp_path, runtime.student)
    assert last == found[-1]
    assert {name: list(kinds) for name, kinds in last.known.items()} == {
        "fake": ["one for fake", "two for fake"], "more": ["two for more"],
    }  # fmt: skip
    assert all(one.pairs == found[0].pairs for one in found) and {pair.prompt for pair in last.pairs} == {"a", "b"}


GB = 10**9


@pytest.mark.parametrize(
    ("loras", "base", "linked", "disk_gb", "memory_gb"),
    [
        ((), "", True, 0, 0),
        ((), "", False, 13, 0),
        (("a LoRA",), "", True, 10, 12),
        (("a LoRA",), "", False, 13, 12),
        ((), "a pipeline", True, 10, 22),
    ],
)
def test_what_is_written_anew_needs_disk_and_memory_though_the_rest_is_linked(
    loras: tuple[str, ...], base: str, linked: bool, disk_gb: int, memory_gb: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 10 GB of a transformer and 3 GB of all else; merging takes 1.2 times the former, and converting 2.2 times."""
    weights = {"transformer": SimpleNamespace(bytes=10 * GB), "vae": SimpleNamespace(bytes=3 * GB)}
    source = SimpleNamespace(weights=weights, base=base, name="it")
    asked: Any = SimpleNamespace(source=source, loras=loras, out=tmp_path / "not" / "there")
    room = {"disk": disk_gb * GB, "memory": memory_gb * GB}
    monkeypatch.setattr(adoption, "SPARE_BYTES", 0)
    monkeypatch.setattr(adoption, "_links", lambda weights, place: linked and place == tmp_path)
    monkeypatch.setattr(adoption.shutil, "disk_usage", lambda place: SimpleNamespace(free=room["disk"]))
    monkeypatch.setattr(adoption, "free_bytes", lambda: room["memory"])
    check_room(asked)
    for kind, wanted, said in (
        ("disk", disk_gb, "of disk space"),
        ("memory", memory_gb, "converting it needs" if base else "merging a LoRA needs"),
    ):
        if wanted:
            room[kind] -= 1
            with pytest.raises(ExportError, match=said):
                check_room(asked)
            room[kind] += 1
    monkeypatch.setattr(adoption, "free_bytes", lambda: None)
    check_room(asked)
