"""The directory of students, and the student that a process opens: which are found, in which order, and with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.models import single
from service.models.folder import Folder, Name, age
from service.settings import Settings
from student.bundle import BundleError
from student.runtimes.fake import fake_student, fake_video_student
from student.runtimes.options import Options
from tests.service.students import make_student


def test_versions_are_in_the_order_in_which_people_count() -> None:
    ordered = ["0.9", "1", "1.2", "1.10", "1.10.1", "1a", "2", "10", "2024-01", "a", "v2", "v10"]
    assert sorted(reversed(ordered), key=age) == ordered


def test_a_name_is_its_id_and_version() -> None:
    name = Name.of("cats/1.0-b")
    assert (name.id, name.version, str(name)) == ("cats", "1.0-b", "cats/1.0-b")
    assert Name.of("cats") == Name("cats", "") and Name.of("a/b/c") == Name("a", "b/c")


def test_every_version_is_found_the_newest_last_and_what_is_no_name_is_not(tmp_path: Path) -> None:
    for id, version in (
        ("b", "10"),
        ("b", "9"),
        ("a", "1"),
        (".a", "1"),
        ("a", "-1"),
        ("a", "x" * 65),
        ("c", "z" * 64),
    ):
        (tmp_path / id / version).mkdir(parents=True)
        (tmp_path / id / version / "student.json").write_text("{}")
    (tmp_path / "d" / "1").mkdir(parents=True)  # without a manifest
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "student.json").write_text("{}")
    folder = Folder(tmp_path)
    assert [str(name) for name in folder.names()] == ["a/1", "b/9", "b/10", "c/" + "z" * 64]
    assert [str(name) for name in folder.newest()] == ["a/1", "b/10", "c/" + "z" * 64]
    assert folder.bundle(Name("no", "1")) == tmp_path / "no" / "1"


def test_a_student_is_the_one_that_its_folder_names(tmp_path: Path) -> None:
    folder, student = Folder(tmp_path), make_student(tmp_path, "a", "1")
    assert folder.student(Name("a", "1")) == student
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "2")
    with pytest.raises(BundleError, match="the manifest in a/2 names a/1 instead"):
        folder.student(Name("a", "2"))
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "2").rename(tmp_path / "b" / "1")
    with pytest.raises(BundleError, match="the manifest in b/1 names a/1 instead"):
        folder.student(Name("b", "1"))
    for unsound in (Name("..", "1"), Name("a", "../../x"), Name("", "1"), Name("a", "")):
        with pytest.raises(BundleError, match="is not a valid ID/VERSION"):
            folder.student(unsound)


def test_a_directory_without_a_student_is_refused_and_why(tmp_path: Path) -> None:
    single.check_models(Settings(runtime="fake"))
    settings = Settings(runtime="fake", models=tmp_path)
    with pytest.raises(StartupError) as refused:
        single.check_models(settings)
    assert str(refused.value) == (
        f"FEWSTEP_MODELS {tmp_path} holds no student: each student must be in a folder ID/VERSION of it."
    )
    make_student(tmp_path, "a", "1")
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "2")
    with pytest.raises(StartupError, match="holds no student; the manifest in a/2 names a/1 instead"):
        single.check_models(settings)
    make_student(tmp_path, "b", "1")
    single.check_models(settings)


def test_a_queue_is_the_students_or_that_of_several(tmp_path: Path) -> None:
    make_student(tmp_path, "cats", "1")
    assert single.queue_name(Settings(runtime="auto", model=tmp_path / "cats" / "1")) == "cats"
    assert single.queue_name(Settings(runtime="fake", models=tmp_path)) == "@models"
    assert single.open_student(Settings(runtime="fake")) == fake_student()
    assert single.open_student(Settings(runtime="fake-video")) == fake_video_student()
    with pytest.raises(StartupError, match="; FEWSTEP_MODEL sets the student to serve"):
        single.open_student(Settings(runtime="auto", model=tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "threads", "options"),
    [
        ({"threads": 3}, 3, Options(single._open_reward, "auto", "off", 0)),
        ({"threads": 1, "score": "off"}, 1, Options(None, "auto", "off", 0)),
        (
            {"score": "0.5", "offload": "cpu", "torch_compile": "graphs"},
            8,
            Options(single._open_reward, "cpu", "graphs", 0),
        ),
        ({"workers": 2}, 8, Options(single._open_reward, "auto", "off", 4)),
    ],
)
def test_a_runtime_is_loaded_with_its_settings(
    settings: dict[str, Any], threads: int, options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr("student.runtimes.load.load", lambda *arguments: loaded.append(arguments))
    monkeypatch.setattr(Settings, "cores", 8)
    single.load_runtime(tmp_path, Settings(runtime="onnx", **settings))
    assert loaded == [(tmp_path, "onnx", threads, options)]


def test_a_student_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise BundleError("it has changed")

    monkeypatch.setattr("student.runtimes.load.load", load)
    with pytest.raises(StartupError) as refused:
        single.open_runtime(Settings(runtime="onnx"))
    assert str(refused.value) == "it has changed."


def test_the_fake_students_tokens_are_words(tmp_path: Path) -> None:
    assert single.counter_of(tmp_path, fake_student(), Settings(runtime="fake"))(" a  red heart ") == 3
    with pytest.raises(BundleError):
        single.counter_of(tmp_path, fake_student(), Settings(runtime="onnx"))


def test_a_manifest_that_cannot_be_read_is_no_student(tmp_path: Path) -> None:
    make_student(tmp_path, "a", "1")
    manifest = tmp_path / "a" / "1" / "student.json"
    manifest.write_text(json.dumps({"id": "a"}))
    assert [str(name) for name in Folder(tmp_path).names()] == ["a/1"], "it is there, and says why when it is opened"
    with pytest.raises(BundleError):
        Folder(tmp_path).student(Name("a", "1"))
