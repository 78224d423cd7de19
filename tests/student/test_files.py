"""Which files belong to a bundle and to its base, and what is said of one that is not as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from student.base import Base, adapter_folder, pipeline_folder, read_base
from student.bundle import BundleError, Student, read_student
from student.files import hash_files, hash_weights, verify_files, write_student
from tests import tiny

INDEX = {"_class_name": "FluxPipeline", "tokenizer": ["t", "T"], "vae": ["d", "V"], "text_encoder_3": [None, None]}
FILES = ("tokenizer/tokenizer.json", "tokenizer/deep/er/words.txt", "vae/config.json", "vae/model.safetensors")
NO_FILES = ("README.md", "runtimes/onnx/step.onnx", "scorers/a.onnx", "probe.json", "adapter/adapter.safetensors")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    put(tmp_path / "tiny", *FILES, *NO_FILES)
    (tmp_path / "tiny" / "model_index.json").write_text(json.dumps(INDEX))
    write_student(tmp_path / "tiny", tiny.student({}))
    return tmp_path / "tiny"


def sums(folder: Path, *names: str) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_the_files_of_the_indexs_parts_are_hashed_at_any_depth(bundle: Path) -> None:
    found = hash_files(bundle)
    assert found == sums(bundle, "model_index.json", *FILES)
    assert list(found) == ["model_index.json", *sorted(FILES)], (
        "the same student.json, whatever the file system's order"
    )
    assert hash_files(bundle, ("vae", "nowhere")) == sums(bundle, *FILES[2:])


def test_a_student_that_is_written_again_forgets_files_that_are_gone(bundle: Path) -> None:
    before = read_student(bundle)
    (bundle / FILES[1]).unlink()
    again = write_student(bundle, before)
    assert again == read_student(bundle) and again.files == sums(bundle, "model_index.json", FILES[0], *FILES[2:])


def test_only_the_folders_that_are_asked_for_are_compared(bundle: Path) -> None:
    student = read_student(bundle)
    (bundle / "vae" / "model.safetensors").write_text("other")
    verify_files(bundle, student, inside=("tokenizer",))
    for spoil, message in (
        (lambda path: path.write_text("other"), r"tokenizer/tokenizer.json has changed since student.json was written"),
        (lambda path: path.unlink(), "tokenizer/tokenizer.json is missing, but student.json names it"),
        (lambda path: put(bundle, *FILES[:1], "tokenizer/new"), "tokenizer/new is not named in student.json"),
    ):
        spoil(bundle / FILES[0])
        with pytest.raises(BundleError, match=message):
            verify_files(bundle, student, inside=("tokenizer",))
    with pytest.raises(BundleError, match=r"vae/model.safetensors has changed"):
        verify_files(bundle, student)


@pytest.fixture
def on_a_base(tmp_path: Path) -> tuple[Path, Path, Student]:
    """A student that has its tokenizer and an adapter, and its base's folder."""
    folder, base = tmp_path / "adapted", tmp_path / "base"
    put(base, *FILES, "model_index.json")
    put(folder, FILES[0], "adapter/adapter.safetensors", "adapter/transformer_2/adapter.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"tokenizer": ["t", "T"]}))
    about = {"model": str(base), "revision": None, "files": sums(base, *FILES[2:])}
    (folder / "base.json").write_text(json.dumps(about))
    return folder, base, write_student(folder, tiny.student({}))


def test_an_adapter_and_the_name_of_its_base_are_part_of_the_student(on_a_base: tuple[Path, Path, Student]) -> None:
    folder, base, student = on_a_base
    adapters = ("adapter/adapter.safetensors", "adapter/transformer_2/adapter.safetensors")
    assert student.files == sums(folder, "base.json", "model_index.json", *adapters, FILES[0])
    verify_files(folder, student)
    assert pipeline_folder(folder) == base and adapter_folder(folder, "transformer") == folder
    assert adapter_folder(folder / "adapter", "transformer_2") == folder / "adapter" / "transformer_2"
    (base / "vae" / "config.json").write_text("other")
    verify_files(folder, student, inside=("tokenizer",))  # a compiled runtime reads no weights of the base
    with pytest.raises(BundleError, match=rf"{base}/vae/config.json is not what {folder} was trained on \(sha256 diff"):
        verify_files(folder, student)
    (base / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=rf"{base}/vae/config.json is missing, but {folder}/base.json names it$"):
        verify_files(folder, student)


def test_a_whole_bundle_has_no_base_and_a_broken_one_is_named(bundle: Path) -> None:
    assert read_base(bundle) is None and pipeline_folder(bundle) == bundle
    for text in ("{", "[]", '{"model": "x"}', '{"model": "x", "revision": null, "files": {}, "more": 1}'):
        (bundle / "base.json").write_text(text)
        with pytest.raises(BundleError, match=r"tiny/base\.json cannot be read: "):
            read_base(bundle)


def test_a_base_is_a_folder_or_that_commit_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=f"^the base {tmp_path}/gone is not there: accepted is that folder$"):
        Base(f"{tmp_path}/gone", None, {}).folder()
    asked: list[Any] = []

    def fetched(*model: str, **options: Any) -> str:
        asked.append((model, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert Base("owner/name", "abc", {}).folder() == tmp_path
    assert asked == [(("owner/name",), {"revision": "abc", "local_files_only": True})], "nothing is downloaded"

    def missing(*model: str, **options: Any) -> str:
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    sentence = "^the base owner/name is not on this machine: `hf download owner/name --revision abc` fetches it$"
    with pytest.raises(BundleError, match=sentence):
        Base("owner/name", "abc", {}).folder()


def test_a_scorers_hash_is_of_names_and_bytes_of_weights_and_configurations(tmp_path: Path) -> None:
    put(tmp_path, "config.json", "model.safetensors", "README.md", "picture.png")
    names = ("config.json", "model.safetensors")
    rows = "".join(f"{name} {value}\n" for name, value in sums(tmp_path, *names).items())
    assert hash_weights(tmp_path) == hashlib.sha256(rows.encode()).hexdigest()
    before = hash_weights(tmp_path)
    (tmp_path / "config.json").write_text("other")
    assert hash_weights(tmp_path) != before
