"""The command: what it writes, what it keeps, and one sentence for each thing that goes wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from export import run as command
from export.card import update_card
from export.compile import Made, Outcome
from export.graph import Part
from export.writing import whole_folder
from student.bundle import read_student
from student.files import verify_files
from student.runtimes.manifest import check_runtime, read_manifest
from tests.export.conftest import Compile

ROOT = Path(__file__).resolve().parents[2]


def complaint(capsys: pytest.CaptureFixture[str], student: Path, to: str = "onnx", **options: Any) -> str:
    with pytest.raises(typer.Exit) as stopped:
        command.run(student=student, to=to, **{"form": "fused", **options})
    assert stopped.value.exit_code == 1
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and "Traceback" not in out.err
    return out.err


def test_what_was_written(compiled: Path) -> None:
    student = read_student(compiled)
    verify_files(compiled, student)
    folder = compiled / "runtimes" / "onnx-fused-fp32"
    manifest = read_manifest(folder)
    check_runtime(folder, student, manifest)
    assert sorted(path.name for path in folder.iterdir()) == ["2-steps.onnx", "4-steps.onnx", "manifest.json"]
    assert sorted(path.name for path in (compiled / "runtimes").iterdir()) == ["onnx-fused-fp32"]
    assert manifest.graphs[4].inputs == {
        "clip_ids": ("batch", 20),
        "t5_ids": ("batch", 24),
        "noise": ("batch", 16, 8, 8),
    }
    assert manifest.graphs[4].outputs == {"images": ("batch", 3, 64, 64)}
    assert manifest.versions.keys() == {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"}
    assert (manifest.student, manifest.precision, manifest.form) == ("tiny 1", "fp32", "fused")
    assert all(0 < value < 1e-4 for parity in manifest.parity.values() for value in parity.max_abs.values())


def test_a_second_run_keeps_what_is_there(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in compiled.rglob("*") if path.is_file()}
    command.run(student=compiled, to="onnx", form="fused")
    assert "is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compiled.rglob("*") if path.is_file()} == before


def test_a_runtime_that_no_cpu_opens_is_made_and_only_its_probe_is_missing(
    compile_family: Compile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "tiny"
    shutil.copytree(compile_family("flux"), bundle)
    command.run(student=bundle, to="onnx", precision="bf16")
    said = " ".join(capsys.readouterr().out.split())
    assert "the golden probe is not measured with onnx-staged-bf16, which does not run here" in said
    manifest = read_manifest(bundle / "runtimes" / "onnx-staged-bf16")
    check_runtime(bundle / "runtimes" / manifest.name, read_student(bundle), manifest)
    assert manifest.precision == "bf16" and manifest.parity


def test_each_mistake_is_one_sentence(
    bundle: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a student: it has no student.json" in complaint(capsys, tmp_path / "nowhere")
    accepted = "cannot compile to 'tpu': accepted are onnx, openvino, tensorrt, tensorrt_rtx"
    assert accepted in complaint(capsys, bundle, to="tpu")
    accepted = "precision is 'fp4': accepted for onnx are fp32, fp16, bf16, int8, fp8"
    assert accepted in complaint(capsys, bundle, precision="fp4")
    assert "onnx in int8 has no fused form: accepted is staged" in complaint(capsys, bundle, precision="int8")
    assert "batches is '0': accepted are numbers from 1 to 63" in complaint(capsys, bundle, batches="0")
    assert f"{tmp_path} does not exist: accepted is a file of prompts" in complaint(capsys, bundle, prompts=tmp_path)
    assert "the scorer 'trained' that tiny was calibrated" in complaint(capsys, bundle, scorers=tmp_path)
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    (copy / "vae" / "config.json").write_text("{}")
    assert "vae/config.json has changed since student.json was written" in complaint(capsys, copy)


def test_another_family_is_refused(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    data = json.loads((copy / "student.json").read_text())
    shutil.rmtree(copy / "runtimes")
    (copy / "student.json").write_text(json.dumps(data | {"family": "sd3"}))
    assert "cannot export the family 'sd3' in fused form: accepted are flux" in complaint(capsys, copy)


def test_from_a_shell_without_a_traceback(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "export.run", "--student", str(tmp_path), "--to", "onnx"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"export: {tmp_path} is not a student: it has no student.json\n"


def test_a_runtime_that_fails_its_proof_is_not_written_and_what_was_finished_is_kept(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph of four steps in the place of that of two is caught, and what was there before stays."""
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    folder = copy / "runtimes" / "onnx-fused-fp32"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mixed_up = folder / "4-steps.onnx"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"]["2"]["sha256"] = "0"  # so that this graph must be made again
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before["manifest.json"] = (folder / "manifest.json").read_bytes()
    exported: list[str] = []

    def export(part: Part, path: Path) -> None:
        exported.append(part.signature.name)
        shutil.copyfile(mixed_up, path)

    monkeypatch.setattr(Part, "export", export)
    for attempt in range(2):
        assert "the images of 2 steps differ from torch" in complaint(capsys, copy)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert exported == ["tiny-2-steps"], attempt
    assert sorted(path.name for path in folder.parent.iterdir()) == [".work", folder.name]


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(
    compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(compiled.rglob("*"))
    command.run(student=compiled, to="onnx", form="fused", dry_run=True)
    fused = capsys.readouterr().out
    assert "runtimes/onnx-fused-fp32 would be built" in fused and re.search(r"4-steps: 0\.\d M parameters", fused)
    assert fused.count("its graph exists") == 2
    command.run(student=compiled, to="tensorrt", dry_run=True)
    staged = capsys.readouterr().out
    assert "tensorrt-staged-bf16-" in staged and "text: " in staged and "MB of disk" in staged
    assert "but not on this machine: tensorrt" in staged
    assert sorted(compiled.rglob("*")) == before


def test_too_little_disk_is_one_sentence(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = shutil.disk_usage(bundle)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert re.search(r"needs 0.00 GB of disk space for this, and 0.00 GB are free", complaint(capsys, bundle))


def test_the_card_has_a_line_for_each_runtime(compiled: Path, tmp_path: Path) -> None:
    outcome = Outcome(compiled / "runtimes/onnx-fused-fp32", read_manifest(compiled / "runtimes/onnx-fused-fp32"),
                      (Made("2-steps", 1, 61.0, False),))  # fmt: skip
    card = tmp_path / "README.md"
    card.write_text("# tiny\n\ntext\n\n## Use\n\nso\n")
    for _ in range(2):
        update_card(tmp_path, outcome)
    text = card.read_text()
    assert text.startswith("# tiny\n\ntext\n\n## Use\n\nso\n\n## Runtimes\n\n| runtime |")
    assert text.count("| onnx-fused-fp32 |") == 1
    assert "| 61 s |" in text and " dB | " in text and "(8 prompts)" in text


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "runtimes" / "onnx"
    with pytest.raises(RuntimeError), whole_folder(target) as unfinished:
        (unfinished / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    for text in ("one", "two"):
        with whole_folder(target) as unfinished:
            assert list(unfinished.iterdir()) == []
            (unfinished / text).write_text(text)
        assert [path.name for path in target.parent.rglob("*")] == ["onnx", text]
