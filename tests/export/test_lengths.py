"""Videos of other lengths: compiled at every size, proven as the student's own is, drawn, and refused by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from export import run as command
from student.bundle import read_student
from student.families.find import family_of
from student.families.resized import resized
from student.pipeline import open_pipeline, reproduce
from student.runtimes.buckets import Bucket, in_buckets, read_bucket, sizes_of
from student.runtimes.lengths import compiled_lengths
from student.runtimes.load import load
from student.runtimes.manifest import read_manifest
from student.runtimes.runtime import VideoRuntime
from tests.student.families import tiny

PROMPTS, SEEDS = ["a red heart"], [7]
OWN, OTHER = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 5 frames of 48x32, compiled for 32x48 too, and at both sizes for 9 frames."""
    folder = tmp_path_factory.mktemp("lengths") / "tiny"
    tiny.build(folder, tiny.wan(seed=21), steps=(2,), height_px=OWN[0], width_px=OWN[1], frames=5)
    (folder / "calibration.txt").write_text("a heart\na ring\n")
    command.run(student=folder, to="onnx", size=["32x48"], frames="9, 5,9")
    return folder


def test_names() -> None:
    named = {"48x32": Bucket(OWN), "48x32x9": Bucket(OWN, 9), "1280x704x121": Bucket((704, 1280), 121)}
    for name, bucket in named.items():
        assert bucket.name == name and read_bucket(name) == bucket
    for wrong in ("48", "48x32x", "48x32xa", "0x32x9", "48x32x9x1"):
        with pytest.raises(ValueError, match="accepted is WIDTHxHEIGHT"):
            read_bucket(wrong)


def test_every_length_at_every_size_is_what_diffusers_draws(bundle: Path) -> None:
    student, runtime = read_student(bundle), load(bundle, "onnx")
    assert isinstance(runtime, VideoRuntime) and runtime.sizes == (OWN, OTHER) == sizes_of(bundle, student)
    assert runtime.lengths == dict.fromkeys((OWN, OTHER), compiled_lengths((5, 9)))
    manifest = read_manifest(bundle / "runtimes" / "onnx-staged-fp32")
    names = ["48x32x9", "32x48", "32x48x9"]
    assert list(manifest.buckets) == names and all(set(rows) == {2} for rows in manifest.buckets.values())
    there = {bucket.name: at.latents.shape for bucket, at in in_buckets(student, manifest).items()}
    assert there["48x32x9"] == (tiny.CHANNELS, 3, 4, 6) and there["32x48"] == (tiny.CHANNELS, 2, 6, 4)
    pipe = open_pipeline(bundle)
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    for size in runtime.sizes:
        for frames in (9, 5):
            videos = runtime.draw(PROMPTS, SEEDS, 2, size=size, frames=frames)
            assert videos.shape == (1, frames, 3, *size)
            theirs = reproduce(pipe, resized(family, student, size, frames), PROMPTS, SEEDS, 2)
            np.testing.assert_allclose(videos, theirs, atol=1e-4)
    np.testing.assert_array_equal(runtime.draw(PROMPTS, SEEDS, 2), runtime.draw(PROMPTS, SEEDS, 2, frames=5, size=OWN))


def test_another_length_is_watched_too(bundle: Path) -> None:
    runtime: Any = load(bundle, "onnx")
    shown: list[tuple[int, ...]] = []
    watched = runtime.draw_watched(PROMPTS, SEEDS, 2, lambda i, preview: shown.append(preview([0]).shape), frames=9)
    assert shown == [(1, 9, 3, *OWN)]
    np.testing.assert_array_equal(watched, runtime.draw(PROMPTS, SEEDS, 2, frames=9))


def test_a_length_that_was_not_compiled_is_refused_with_those_that_were(bundle: Path) -> None:
    runtime: Any = load(bundle, "onnx")
    with pytest.raises(ValueError, match="frames is 13: tiny-wan was compiled for 5, 9 at 48x32$"):
        runtime.draw(PROMPTS, SEEDS, 2, frames=13)
    with pytest.raises(ValueError, match="generates 48x32 or 32x48 pixels and no other size"):
        runtime.draw(PROMPTS, SEEDS, 2, size=(64, 64), frames=9)


def test_a_dry_run_counts_every_length(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(student=bundle, to="onnx", frames="9", dry_run=True)
    said = capsys.readouterr().out
    assert "  decoder-48x32x9: " in said and "  step-48x32x9: " in said and said.count("text: ") == 1


def complaint(capsys: pytest.CaptureFixture[str], bundle: Path, **options: Any) -> str:
    with pytest.raises(typer.Exit):
        command.run(student=bundle, to="onnx", **options)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_lengths_that_cannot_be(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("nine", "0", "9,,17", "2000"):
        said = f"frames is {wrong!r}: accepted are numbers from 1 to 1024, separated by commas"
        assert said in complaint(capsys, bundle, frames=wrong)
    said = "48x32x7 is not a size of the family wan: frames is 7: accepted is 1 plus a multiple of 4"
    assert said in complaint(capsys, bundle, frames="7")
    tiny.build(tmp_path / "tiny", tiny.flux())
    assert "tiny-flux generates images, not videos: leave --frames out" in complaint(
        capsys, tmp_path / "tiny", frames="9"
    )
