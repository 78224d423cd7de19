"""Which files of a published pipeline are taken, by their names and headers alone; and the command that measures."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from export import measure, within
from export.errors import ExportError
from export.journal import Journal
from export.measure import Measurement
from export.score import score
from export.source import Weights, _chosen, find_weights, header, is_pointer
from student.bundle import RewardReference, Scorer, Student, WithinPrompt
from tests import tiny


def put(folder: Path, *names: str) -> None:
    """Weight files with one tensor of 8 bytes, and indices that name two shards."""
    for name in names:
        file = folder / "unet" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            variant = name.removesuffix(".json").rpartition("index")[2]
            shards = [f"model{variant}-0000{k}-of-00002.safetensors" for k in (2, 1)]
            file.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}))
            put(folder, *shards)
        else:
            head = json.dumps({"__metadata__": {"x": "y"}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
            file.write_bytes(struct.pack("<Q", len(head)) + head.encode() + bytes(8))


PLAIN, BF16, FP16 = (f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".bf16", ".fp16"))
SHARDED = "model.safetensors.index.bf16.json"


@pytest.mark.parametrize(
    ("there", "taken", "variant"),
    [
        ((PLAIN, BF16, FP16), [PLAIN], ""),
        ((BF16, FP16), [BF16], "bf16"),
        ((FP16, "model.ema.safetensors"), [FP16], "fp16"),
        (("model.ema.safetensors", "other.x.safetensors"), ["model.ema.safetensors"], "ema"),
        (("model.safetensors", PLAIN), [PLAIN], ""),
        (
            ("model.safetensors.index.json", "model.safetensors"),
            [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)],
            "",
        ),
        ((SHARDED, FP16), ["model.bf16-00001-of-00002.safetensors", "model.bf16-00002-of-00002.safetensors"], "bf16"),
    ],
)
def test_the_plain_weights_are_taken_else_bf16_else_fp16_else_whatever_there_is(
    tmp_path: Path, there: tuple[str, ...], taken: list[str], variant: str
) -> None:
    put(tmp_path, *there)
    found = find_weights(tmp_path, "unet")
    assert ([file.name for file in found.files], found.variant) == (taken, variant)
    assert found.bytes == sum((tmp_path / "unet" / name).stat().st_size for name in taken)
    plain = [name.replace(f".{variant}", "") if variant else name for name in taken]
    assert list(found.plain_names().values()) == plain
    if there[0].endswith(".json"):
        name, data = found.plain_index() or ("", {})
        assert name == "model.safetensors.index.json"
        assert data["weight_map"] == {"a": plain[1], "b": plain[0], "c": plain[1]}
    else:
        assert found.index is None and found.plain_index() is None


def test_weights_that_are_not_there_are_refused_by_what_is(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="lacks the folder 'unet' that its model_index.json names$"):
        find_weights(tmp_path, "unet")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ExportError, match="unet has no weights: accepted is diffusion_pytorch_model.safetensors or mo"):
        find_weights(tmp_path, "unet")
    for ending in (".bin", ".pt", ".pth", ".ckpt", ".msgpack"):
        (file := tmp_path / "unet" / f"model{ending}").touch()
        with pytest.raises(ExportError, match=rf"unet has its weights only as pickles \(model{ending}\): accepted are"):
            find_weights(tmp_path, "unet")
        file.unlink()
    (tmp_path / "unet" / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ExportError, match="unet/model.safetensors is a link to a file that does not exist: download"):
        find_weights(tmp_path, "unet")
    (tmp_path / "unet" / "model.safetensors").unlink()
    put(tmp_path, SHARDED)
    (tmp_path / "unet" / "model.bf16-00002-of-00002.safetensors").unlink()
    with pytest.raises(ExportError, match="00002-of-00002.safetensors is missing, although model.*bf16.json names it$"):
        find_weights(tmp_path, "unet")


def test_a_header_is_read_only_of_a_whole_file(tmp_path: Path) -> None:
    put(tmp_path, PLAIN)
    file = tmp_path / "unet" / PLAIN
    whole = file.read_bytes()
    assert header(file) == {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    file.write_bytes(whole[:-3])
    with pytest.raises(ExportError, match="is incomplete: its last 3 bytes are missing$"):
        header(file)
    for spoilt, reason in (
        (b"", ""),
        (whole[:20], "its header is longer than the file"),
        (struct.pack("<Q", 4) + b"{{{{", ""),
    ):
        file.write_bytes(spoilt)
        with pytest.raises(ExportError, match=f"is not a safetensors file, or is incomplete: .*{reason}"):
            header(file)


def test_a_pointer_is_short_and_begins_with_its_version(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for size, pointer in ((1024, True), (1025, False)):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n".ljust(size))
        assert is_pointer(file) is pointer
    file.write_bytes(b" version https://git-lfs.github.com/spec/v1\n")
    assert not is_pointer(file)


def test_of_each_part_one_type_is_downloaded() -> None:
    names = [
        f"{part}/model{kind}"
        for part, kinds in {
            "both": (".safetensors", ".bf16.safetensors", ".fp16.safetensors", ".bin"),
            "short": (".fp16.safetensors", ".bf16-1.safetensors", ".bf16-2.safetensors"),
            "half": (".fp16.safetensors",),
            "unnamed": (".safetensors",),
        }.items()
        for kind in kinds
    ]
    index: dict[str, Any] = {"_class_name": "X", "both": ["a", "B"], "short": ["a", "B"], "half": ["a", "B"], "no": [0]}
    assert _chosen(names, index) == [
        "both/model.safetensors",
        "short/model.bf16-1.safetensors",
        "short/model.bf16-2.safetensors",
        "half/model.fp16.safetensors",
    ]


def test_a_journal_keeps_whole_rows_of_the_same_measurement(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "a.jsonl"
    first = Journal(path, {"of": 1})
    for row in ({"n": 1}, {"n": 2}):
        first.add(row)
    with path.open("a") as file:
        file.write('{"n": 3')
    again = Journal(path, {"of": 1})
    assert again.rows == [{"n": 1}, {"n": 2}]
    again.add({"n": 4})
    assert Journal(path, {"of": 1}).rows == [{"n": 1}, {"n": 2}, {"n": 4}]
    assert path.read_text() == '{"of": 1}\n{"n": 1}\n{"n": 2}\n{"n": 4}\n'
    path.write_text('{"of": 1}\n{"n": 1}\n{"n"\n{"n": 5}\n')
    assert Journal(path, {"of": 1}).rows == [{"n": 1}], "what stands behind a torn line is not trusted"
    path.write_text('{"of": 1}\n{"n": 1}\n')
    assert Journal(path, {"of": 2}).rows == [] and path.read_text() == '{"of": 2}\n'


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks for, in order."""
    found: list[Any] = []
    pair = Scorer("scorers/a.onnx", 0.25, 0.5, "heldout")
    student = replace(tiny.student({"a": pair, "b": pair}), reward_reference={"a": RewardReference(0, 1, {})})

    def added(bundle: Path, measurement: Measurement) -> Student:
        found.append((bundle, measurement))
        return student

    def varied(*given: Any) -> Student:
        found.append(given)
        return replace(student, within_prompt={"4": WithinPrompt(2, 8, {"a": 0.756, "b": 0.5}, {}, {})})

    monkeypatch.setattr("student.bundle.read_student", lambda bundle: student)
    monkeypatch.setattr(measure, "add_scorers", added)
    monkeypatch.setattr(within, "add_within_prompt", varied)
    return found


def call(*argv: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(score)
    done = CliRunner().invoke(app, [str(word) for word in argv])
    return done.exit_code, done.output


def test_the_command_measures_what_it_is_told(tmp_path: Path, asked: list[Any]) -> None:
    lines = tuple(f"prompt {k}" for k in range(70))
    (file := tmp_path / "p.txt").write_text("\n".join(lines))
    code, said = call(
        "bundle", "--prompts", file, "--reward", "clip, hpsv2.1,", "--reward", "clip", "--threads", "3",
        "--runtime", "onnx",
    )  # fmt: skip
    assert code == 0, said
    bundle, measurement = asked[0]
    assert bundle == Path("bundle") and measurement == Measurement(
        ("clip", "hpsv2.1"), lines, 70, "onnx", 3, typer.echo
    )  # fmt: skip
    assert asked[1:] == [(Path("bundle"), lines[:16], 8, "onnx", 3)]
    assert said.splitlines() == ["a: 0.25 ± 0.5", "b", "within a prompt at 4 steps: a 0.76, b 0.50"]


def test_the_commands_numbers_have_bounds_and_defaults(tmp_path: Path, asked: list[Any]) -> None:
    (file := tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    assert call("b", "--prompts", file, "--reward", "clip", "--seeds", "0")[0] == 0
    assert [measurement.images for _, measurement in asked] == [64]
    asked.clear()
    assert call("b", "--prompts", file, "--within", "2", "--seeds", "5")[0] == 0
    assert asked == [(Path("b"), ("one", "two"), 5, "auto", 1)], "no scorer is added"
    code, said = call("b", "--prompts", file, "--reward", "clip", "--images", "7")
    assert code == 1 and said == "score: images is 7: accepted is 8 or more\n"
    for wrong in (("--within", "1"), ("--threads", "0"), ("--seeds", "-1")):
        assert call("b", "--prompts", file, *wrong)[0] == 2


def test_weights_names_lose_their_variant_once() -> None:
    file = Path("model.fp16-00001.fp16.safetensors")
    assert Weights((file,), None, "fp16").plain_names() == {file: "model-00001.fp16.safetensors"}
