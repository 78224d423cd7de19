"""manifest.json of a runtime: every field is read as it was written, and each that is not the student's refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from student.bundle import BundleError, Student
from student.files import sha256
from student.runtimes.manifest import (
    Change,
    Graph,
    Parity,
    RuntimeManifest,
    StageError,
    check_runtime,
    read_manifest,
    write_manifest,
)
from tests import tiny

NAME = "onnx-staged-int8"
GOOD = Parity({1: 1e-3, 7: 2e-3}, 0.01, 41.5, 40.0, {"trained": Change(-0.01, 0.002, 24)}, 33.0, 30.0)
STUDENT = tiny.student({})


def _row(folder: Path, file: str, data: str = "", **more: Any) -> Graph:
    for name in filter(None, (file, data)):
        (folder / name).write_bytes(name.encode())
    shapes = {"latents": ("batch", 16, 8, 8), "sigma": ("batch",)}, {"velocity": ("batch", 16, 8, 8)}
    beside = {"data": data, "data_sha256": sha256(folder / data)} if data else {}
    return Graph(file, sha256(folder / file), **{"sigmas": (), **more}, inputs=shapes[0], outputs=shapes[1], **beside)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tiny" / "runtimes" / NAME
    found.mkdir(parents=True)
    return found


def whole(folder: Path, student: Student = STUDENT) -> RuntimeManifest:
    """A manifest of which no field has its default."""
    return RuntimeManifest(
        name=NAME,
        form="staged",
        precision="int8",
        student="tiny 1",
        source_sha256=student.fingerprint(),
        graphs={steps: _row(folder, f"{steps}.onnx", sigmas=student.sigmas[steps]) for steps in (4, 2)},
        parity={4: GOOD, 2: replace(GOOD, reward={})},
        opset=20,
        versions={"torch": "2.9", "onnx": "1.20"},
        stages={
            "text": _row(folder, "text.onnx", key="ab"),
            "step": _row(folder, "step.onnx", "step.onnx.data"),
            "step-96x32": _row(folder, "step-96x32.onnx"),
        },
        stage_errors={"text": StageError(1e-6, 2e-6), "step": StageError(0.02, 0.5, (0.01, 0.02))},
        kept_float32={"Softmax": "its sums are long"},
        requires={"os": "Linux"},
        in_torch={"decoder": "it has no ONNX form"},
        profiles=((1, 1, 1), (2, 4, 4)),
        buckets={"96x32": {4: GOOD, 2: GOOD}, "64x64x33": {4: GOOD, 2: GOOD}},
        bucket_sigmas={"96x32": {4: (1.0, 0.8, 0.6, 0.3), 2: (1.0, 0.6)}},
        boundary=0.875,
        cache_key="cd",
    )


def test_every_field_is_read_as_it_was_written(folder: Path) -> None:
    manifest = whole(folder)
    for one in fields(RuntimeManifest):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        assert one.name == "format" or getattr(manifest, one.name) != default, one.name
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    plain = replace(manifest, bucket_sigmas={}, boundary=None)
    write_manifest(folder, plain)
    assert read_manifest(folder) == plain
    assert not {"bucket_sigmas", "boundary"} & json.loads((folder / "manifest.json").read_text("utf-8")).keys()


def test_a_manifest_of_the_student_is_accepted_with_figures_at_their_limits(folder: Path) -> None:
    manifest = whole(folder)
    check_runtime(folder, STUDENT, manifest)
    at_limit = Parity({1: 0.25}, 0.25, 40.0, 40.0, {}, 30.0, 30.0)
    check_runtime(folder, STUDENT, replace(manifest, parity=dict.fromkeys((4, 2), at_limit)))
    without = Parity({1: 0.25}, 0.25)  # a precision without lower limits
    check_runtime(folder, STUDENT, replace(manifest, parity=dict.fromkeys((4, 2), without)))
    other_sigmas = {**manifest.graphs, 2: replace(manifest.graphs[2], sigmas=(1.0, 0.1))}
    check_runtime(folder, STUDENT, replace(manifest, graphs=other_sigmas))  # a staged form has the loop outside


def _parity(**change: Any) -> Callable[[RuntimeManifest], RuntimeManifest]:
    return lambda one: replace(one, parity={**one.parity, 2: replace(GOOD, **change)})


def _bucket(**change: Any) -> Callable[[RuntimeManifest], RuntimeManifest]:
    return lambda one: replace(one, buckets={**one.buckets, "64x64x33": {4: GOOD, 2: replace(GOOD, **change)}})


NAN = float("nan")
WRONG: dict[str, tuple[Callable[[RuntimeManifest], RuntimeManifest], str]] = {
    "another student": (lambda one: replace(one, source_sha256="0"), r"another student \(source_sha256 differs\)"),
    "a step count unproven": (lambda one: replace(one, parity={4: GOOD}), "never compared .* at 2 steps"),
    "no batch compared": (_parity(max_abs={}), "never compared .* at 2 steps"),
    "the worst batch": (_parity(max_abs={1: 1e-3, 7: 0.011}), "differs .* by 0.011 at 2 steps: accepted is 0.01$"),
    "no number": (_parity(max_abs={1: NAN}), "differs .* by nan at 2 steps"),
    "the PSNR": (_parity(psnr_db=39.9), "has a PSNR of 39.9 dB at 2 steps: accepted is 40.0 or more$"),
    "no PSNR": (_parity(psnr_db=None), "has a PSNR of None dB at 2 steps: accepted is 40.0 or more$"),
    "a PSNR that is no number": (_parity(psnr_db=NAN), "has a PSNR of nan dB"),
    "one picture": (_parity(picture_db=29.9), "PSNR in its worst picture of 29.9 dB at 2 steps: accepted is 30.0 or"),
    "no picture": (_parity(picture_db=None), "PSNR in its worst picture of None dB"),
    "a bucket unproven": (lambda one: replace(one, buckets={"96x32": {4: GOOD}}), "never compared .* at 2 steps"),
    "a bucket's worst": (_bucket(max_abs={7: 0.5}), "differs .* by 0.5 at 2 steps"),
    "a bucket's PSNR": (_bucket(psnr_db=1.0), "has a PSNR of 1.0 dB"),
    "a bucket's sigmas": (
        lambda one: replace(one, bucket_sigmas={"96x32": {4: (1.0, 0.8, 0.6, 0.3)}}),
        "has no sigmas for 2 steps at 96x32: make it again with export.run --student .*tiny$",
    ),
    "no fused graph": (lambda one: replace(one, form="fused", graphs={4: one.graphs[4]}), "has no graph for 2 steps"),
    "fused sigmas": (
        lambda one: replace(
            one, form="fused", graphs={**one.graphs, 2: replace(one.graphs[2], sigmas=STUDENT.sigmas[4])}
        ),
        "has other sigmas for 2 steps than the student",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_the_students_or_not_proven_is_refused(
    folder: Path, spoil: Callable[[RuntimeManifest], RuntimeManifest], message: str
) -> None:
    manifest = whole(folder)
    check_runtime(folder, STUDENT, replace(manifest, form="fused"))
    with pytest.raises(BundleError, match=message):
        check_runtime(folder, STUDENT, spoil(manifest))


@pytest.mark.parametrize("file", ["4.onnx", "2.onnx", "text.onnx", "step.onnx", "step.onnx.data", "step-96x32.onnx"])
def test_every_file_that_it_names_must_be_the_one_that_was_made(folder: Path, file: str) -> None:
    manifest = whole(folder)
    (folder / file).write_bytes(b"other")
    with pytest.raises(BundleError, match=rf"{file} has changed since it was made \(sha256 differs\): make it again"):
        check_runtime(folder, STUDENT, manifest)
    (folder / file).unlink()
    with pytest.raises(BundleError, match=f"{file} is missing: make it again with export.run --student .*tiny$"):
        check_runtime(folder, STUDENT, manifest)
