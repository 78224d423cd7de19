"""The golden probe: what it compares, worked out by hand, and what its file says."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from student.bundle import BundleError
from student.probe import (
    FILE,
    Measured,
    Outcome,
    Probe,
    choose_pairs,
    compare,
    digest,
    measure,
    read_probe,
    write_probe,
)
from student.runtimes.fake import FakeRuntime, fake_image, fake_student
from student.runtimes.machine import machine_kind
from student.schedule import sigmas

STUDENT = fake_student()
BEFORE = Measured(("a", "b"), {"trained": (0.5, 1.0)})


def test_every_step_count_is_probed_with_prompts_and_seeds_of_its_own() -> None:
    pairs = choose_pairs(STUDENT, ["p", "q"])
    assert [pair.steps for pair in pairs] == [1, 2, 4, 1, 2, 4, 1, 2]
    assert len({pair.seed for pair in pairs}) == 8 and {pair.prompt for pair in pairs} == {"p", "q"}


def test_every_one_of_many_step_counts_is_probed() -> None:
    counts = tuple(range(12, 0, -1))
    student = replace(STUDENT, steps=counts, sigmas={count: sigmas(count) for count in counts})
    assert [pair.steps for pair in choose_pairs(student, ["p"])] == list(range(1, 13))


def test_a_hash_is_of_all_bits_of_the_picture() -> None:
    image = np.full((1, 3, 2, 2), 0.5, np.float32)
    assert digest(image) == hashlib.sha256(np.full((3, 2, 2), 0.5, "<f4").tobytes()).hexdigest()
    nudged = image.copy()
    nudged[0, 0, 0, 0] = np.nextafter(np.float32(0.5), np.float32(1))
    assert digest(nudged) != digest(image)


def test_what_is_measured_is_what_the_runtime_draws() -> None:
    pairs = choose_pairs(STUDENT, ["p", "q"])
    found = measure(FakeRuntime(), pairs)
    images = [fake_image(pair.prompt, pair.seed, pair.steps)[None] for pair in pairs]
    assert found.sha256 == tuple(map(digest, images))
    assert found.scores["heldout"] == pytest.approx([float(image[0, 2].mean() * 4 - 2) for image in images], abs=1e-6)


@pytest.mark.parametrize(
    ("found", "exact", "alike", "outcome"),
    [
        (BEFORE, BEFORE, BEFORE, Outcome.SAME),
        (replace(BEFORE, sha256=("a", "c")), BEFORE, BEFORE, Outcome.PIXELS_CHANGED),
        (Measured(("a", "b"), {"trained": (0.5, 1.01)}), BEFORE, BEFORE, Outcome.SCORES_CHANGED),
        (Measured(("a", "b"), {"trained": (0.5, math.nan)}), BEFORE, BEFORE, Outcome.SCORES_CHANGED),
        (Measured(("x", "y"), {"trained": (0.54, 1.0)}), None, BEFORE, Outcome.RECORDED),
        (Measured(("x", "y"), {"trained": (0.56, 1.0)}), None, BEFORE, Outcome.SCORES_CHANGED),
        (Measured(("x", "y"), {"trained": (9.0, 9.0)}), None, None, Outcome.RECORDED),
        (Measured(("a", "b"), {"trained": (0.5, 1.0005)}), BEFORE, BEFORE, Outcome.SAME),
        (Measured(("a", "b"), {"trained": (0.502, 1.0)}), BEFORE, BEFORE, Outcome.SCORES_CHANGED),
        (Measured(("a", "b"), {"trained": (0.5, 1.0), "new": (9.0, 9.0)}), BEFORE, BEFORE, Outcome.SAME),
        (Measured(("x", "y"), {}), None, BEFORE, Outcome.RECORDED),  # the scorer is not installed here
    ],
)
def test_what_a_probe_finds(found: Measured, exact: Measured | None, alike: Measured | None, outcome: Outcome) -> None:
    assert compare(found, exact, alike, 0.05) is outcome


def test_a_probe_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = {"fake": {"here": Measured(("a",) * 8, {"trained": (0.25, math.nan)})}}
    probe = Probe(STUDENT.fingerprint(), choose_pairs(STUDENT, ["p"]), kept, score_tolerance=0.25)
    write_probe(tmp_path, probe)
    found = read_probe(tmp_path, STUDENT)
    assert found is not None and repr(found) == repr(probe)  # NaN is not equal to itself
    assert read_probe(tmp_path, replace(STUDENT, max_tokens=99)) is None  # another student's
    assert read_probe(tmp_path / "nothing", STUDENT) is None


def test_a_file_that_is_no_probe_is_named(tmp_path: Path) -> None:
    for text in ("{", json.dumps({"format": 2}), json.dumps({"format": 1})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(BundleError, match=r"probe\.json cannot be used .*: make it again with export\.probe"):
            read_probe(tmp_path, STUDENT)


def test_a_machine_is_named_by_what_its_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from student.runtimes import machine

    monkeypatch.setattr(machine, "find_gpu", lambda: (None, "none"))
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2", "fpu", "fma"}))
    monkeypatch.setattr(machine, "library_version", lambda name: f"{name}!")
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine_kind("onnx-staged-fp32") == "Linux x86_64 avx2 fma onnx-onnx!"
    assert machine_kind("fake") == "Linux x86_64 avx2 fma"
    monkeypatch.setattr(machine, "find_gpu", lambda: (machine.Gpu("NVIDIA H200", "9.0", 1, "12.8"), ""))
    assert machine_kind("tensorrt-x") == "Linux x86_64 avx2 fma h200 cuda-12.8 tensorrt-tensorrt!"
