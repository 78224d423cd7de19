"""``fewstep adopt`` is ``python -m export.adopt``: the same options, the same sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fewstep.cli import app
from student.bundle import read_student
from tests.student.families import tiny


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


def test_a_published_pipeline_is_adopted(tmp_path: Path) -> None:
    tiny.sd3().save_pretrained(tmp_path / "turbo")
    out = tmp_path / "students" / "turbo"
    code, said = call("adopt", tmp_path / "turbo", "--steps", "4,2", "--size", "32x64", "--out", out)
    assert code == 0 and f"FEWSTEP_MODEL={out} serves it" in said
    assert read_student(out).steps == (4, 2)


def test_help_and_mistakes_are_its_own(tmp_path: Path) -> None:
    code, said = call("adopt", "--help")
    assert code == 0 and "fewstep adopt" in said and "--lora" in said
    assert call("adopt", tmp_path / "nothing", "--out", tmp_path / "out")[0] == 1
    assert "accepted are a folder" in call("adopt", tmp_path / "nothing", "--out", tmp_path / "out")[1]
    assert call("adopt", "x")[0] == 2


def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from fewstep.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "adopt", "x", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr == "adopt: torch is not installed: pip install 'fewstep[export]'\n"
