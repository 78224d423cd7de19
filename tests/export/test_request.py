"""What is read of an export's options, and what is estimated before anything is loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from export.errors import ExportError
from export.preflight import Estimate, estimates, memory_bytes
from export.request import EngineOptions, Request, read_frames, read_prompts, read_sizes
from export.single_file import find_model
from export.verify import MORE_PROMPTS, PROMPTS
from student.bundle import ImageSize, Student
from student.runtimes.buckets import Bucket
from tests import tiny


def _video() -> Student:
    picture = tiny.student({})
    return replace(picture, latents=replace(picture.latents, frames=2), image=ImageSize(64, 64, 5, 16))


def test_the_defaults_of_an_engine_are_the_documented_ones() -> None:
    found = EngineOptions()
    assert (found.batches, found.level, found.portable, found.batch_invariant) == ((1, 2, 4, 8), 3, False, False)
    assert (found.memory_bytes, found.workspace_bytes) == (64 * 2**30, 4 * 2**30)


def test_sizes_are_the_others_once_each_in_their_order() -> None:
    student = tiny.student({})
    names = ("64x64", "96x32", "32x96", "96x32")
    assert read_sizes(student, names, "staged") == ((32, 96), (96, 32))
    assert read_sizes(student, ("64x64",), "fused") == ()
    with pytest.raises(ExportError, match="^the fused form has only the student's own size: use --size with --form st"):
        read_sizes(student, names, "fused")
    with pytest.raises(ExportError, match="0x32"):
        read_sizes(student, ("0x32",), "staged")


def test_frames_are_the_others_once_each_in_their_order() -> None:
    assert read_frames(_video(), " 9, 5,1 ,9,1024", "staged") == (9, 1, 1024)
    assert read_frames(_video(), "", "staged") == () and read_frames(_video(), "5", "fused") == ()
    for wrong in ("1025", "0", "-1", "1.5", "9,"):
        with pytest.raises(ExportError, match="accepted are numbers from 1 to 1024, separated by commas$"):
            read_frames(_video(), wrong, "staged")
    with pytest.raises(ExportError, match="^the fused form has only the student's own length: use --frames with"):
        read_frames(_video(), "9", "fused")
    with pytest.raises(ExportError, match="^tiny generates images, not videos: leave --frames out$"):
        read_frames(tiny.student({}), "9", "staged")
    assert read_frames(tiny.student({}), "", "fused") == ()


def test_every_size_is_made_in_every_length_but_the_students_own() -> None:
    request = Request(Path("b"), _video(), "staged", "fp32", sizes=((32, 96),), frames=(9, 1))
    own, other = (64, 64), (32, 96)
    assert request.buckets == (
        Bucket(own, 9),
        Bucket(own, 1),
        Bucket(other, None),
        Bucket(other, 9),
        Bucket(other, 1),
    )
    assert replace(request, sizes=(), frames=()).buckets == ()


def test_the_proofs_prompts_are_the_files_else_the_bundles_else_ours(tmp_path: Path) -> None:
    assert read_prompts(tmp_path, None, "fp32") == PROMPTS
    assert {read_prompts(tmp_path, None, precision) for precision in ("bf16", "int8", "fp8", "fp16")} == {MORE_PROMPTS}
    (tmp_path / "calibration.txt").write_text("a heart\n \n\na ring\n")
    assert read_prompts(tmp_path, None, "bf16") == ("a heart", "a ring")
    (file := tmp_path / "mine.txt").write_text("one\ntwo\nthree")
    assert read_prompts(tmp_path, file, "fp32") == ("one", "two", "three")
    file.write_text("one\n\n")
    with pytest.raises(ExportError, match=r"mine.txt has 1 prompts: accepted are two or more, one per line$"):
        read_prompts(tmp_path, file, "fp32")


def _weights(path: Path, **tensors: tuple[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros whose tensors have these types and shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
    rows, end = {}, 0
    for name, (kind, shape) in tensors.items():
        count = width.get(kind, 1)
        for side in shape:
            count *= side
        rows[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def test_estimates_count_each_parts_weights_at_the_narrower_of_disk_and_precision(tmp_path: Path) -> None:
    """100 and 10 of the transformer, 7 of the decoder, 30 and 5 of the encoders, of which some are already short."""
    _weights(tmp_path / "transformer" / "a.safetensors", wide=("F32", (10, 10)))
    _weights(tmp_path / "transformer" / "b.safetensors", short=("BF16", (10,)))
    _weights(tmp_path / "vae" / "a.safetensors", wide=("F32", (7,)))
    _weights(tmp_path / "text_encoder" / "a.safetensors", short=("F16", (30,)))
    _weights(tmp_path / "text_encoder_2" / "a.safetensors", long=("I64", (5,)))
    (tmp_path / "model_index.json").write_text("{}")
    student = tiny.student({})

    def rows(form: str, precision: str, *buckets: Bucket) -> list[tuple[str, int, int]]:
        found = estimates(tmp_path, student, form, precision, buckets)
        return [(row.stage, row.parameters, row.disk_bytes) for row in found]

    text, decoder = ("text", 35, 30 * 2 + 5 * 8), ("decoder", 7, 28)  # the precision is the step's alone
    of_step = {"fp32": 420, "bf16": 220, "fp16": 220, "int8": 110, "fp8": 110}
    for precision, size in of_step.items():
        assert sorted(rows("staged", precision)) == [decoder, ("step", 110, size), text]
    other = rows("staged", "fp32", Bucket((32, 96), None))
    assert sorted(other) == sorted(
        [decoder, ("step", 110, 420), text, ("decoder-96x32", 7, 28), ("step-96x32", 110, 420)]
    )
    assert rows("fused", "fp32") == [("4-steps", 152, 420 + 28 + 100), ("2-steps", 152, 548)]
    assert memory_bytes([Estimate("a", 5, 0), Estimate("b", 7, 9)]) == 84 and memory_bytes([]) == 0


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8", "F4"])
def test_a_single_file_of_quantised_weights_is_refused(tmp_path: Path, kind: str) -> None:
    _weights(file := tmp_path / "a.safetensors", x=("F32", (2,)), y=(kind, (4,)))
    with pytest.raises(ExportError, match=f"a.safetensors has its weights as {kind}: accepted are BF16, F16 and F32$"):
        find_model(str(file), "no/such-pipeline.json")


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_a_single_file_of_plain_weights_is_not(tmp_path: Path, kind: str) -> None:
    """It comes as far as the pipeline that it is said to belong to."""
    _weights(file := tmp_path / "a.safetensors", x=(kind, (2,)), y=("I64", (1,)))
    with pytest.raises(ExportError, match=r"nowhere.json does not exist: accepted are a folder, a .safetensors file"):
        find_model(str(file), "nowhere.json")
    with pytest.raises(ExportError, match=r"a.safetensors is a single file, without a tokenizer and sizes"):
        find_model(str(file))
    with pytest.raises(ExportError, match="^--config goes with a single .safetensors file, but nowhere.json is not"):
        find_model("nowhere.json", "config")
