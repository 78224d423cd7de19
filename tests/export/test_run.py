"""The command: what it writes, what it keeps, and one sentence for each thing that goes wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from export import run as command
from export import to_onnx
from export.errors import ExportError
from export.writing import whole_folder
from student.bundle import read_student, verify_files
from student.runtimes.manifest import check_runtime, read_manifest

ROOT = Path(__file__).resolve().parents[2]


def complaint(capsys: pytest.CaptureFixture[str], student: Path, to: str = "onnx", scorers: Path | None = None) -> str:
    with pytest.raises(typer.Exit) as stopped:
        command.run(student=student, to=to, scorers=scorers)
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
    command.run(student=compiled, to="onnx")
    assert "is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compiled.rglob("*") if path.is_file()} == before


def test_each_mistake_is_one_sentence(
    bundle: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a student: it has no student.json" in complaint(capsys, tmp_path / "nowhere")
    assert "cannot compile to 'tpu': accepted is onnx" in complaint(capsys, bundle, to="tpu")
    assert "the scorer 'trained' that tiny was calibrated" in complaint(capsys, bundle, scorers=tmp_path)
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    (copy / "vae" / "config.json").write_text("{}")
    assert "vae/config.json has changed since student.json was written" in complaint(capsys, copy)


def test_another_family_is_refused(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    data = json.loads((copy / "student.json").read_text())
    shutil.rmtree(copy / "runtimes")
    (copy / "student.json").write_text(json.dumps(data | {"family": "sd3"}))
    assert "cannot export the family 'sd3' in fused form: accepted is flux" in complaint(capsys, copy)


def test_from_a_shell_without_a_traceback(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "export.run", "--student", str(tmp_path), "--to", "onnx"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"export: {tmp_path} is not a student: it has no student.json\n"


def test_a_runtime_that_fails_its_proof_is_not_written(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of four steps in the place of that of two is caught, and what was there before stays."""
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    folder = to_onnx.folder(copy)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mixed_up = (folder / "4-steps.onnx").read_bytes()
    monkeypatch.setattr(to_onnx, "export_fused", lambda pipe, student, tokens, steps: mixed_up)
    with pytest.raises(ExportError, match="the images of 2 steps differ from torch"):
        to_onnx.export_student(copy, read_student(copy), threads=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


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
