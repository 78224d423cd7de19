"""How long a video may be at each size: as long as its memory allows, whatever the student's own length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from student.bundle import read_student
from student.runtimes import torch as module
from student.runtimes.fake import fake_student
from student.runtimes.lengths import LONGEST, Lengths, compiled_lengths, frame_step, longest, read_lengths
from student.runtimes.torch import TorchRuntime
from tests.student.families import tiny

OWN, LARGER = (32, 48), (64, 96)
FRAMES = 13


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "wan"
    tiny.build(folder, tiny.wan(), steps=(1,), height_px=OWN[0], width_px=OWN[1], frames=FRAMES)
    return folder


@pytest.mark.parametrize("lengths", [Lengths(1, 33, 4), compiled_lengths((9,)), compiled_lengths((81, 33, 17))])
def test_a_workers_report_is_read_again(lengths: Lengths) -> None:
    assert read_lengths(json.loads(json.dumps(lengths.record()))) == lengths


def test_compiled_lengths_are_those_that_there_are_graphs_for() -> None:
    lengths = compiled_lengths((81, 17, 33, 17))
    assert (lengths.first, lengths.most, lengths.step) == (17, 81, 16)
    assert [count for count in range(100) if count in lengths] == [17, 33, 81]
    assert compiled_lengths((9,)) == Lengths(9, 9, 1, (9,))


@pytest.mark.parametrize(("first", "most", "step"), [(1, 33, 4), (5, 30, 3), (2, 2, 1), (8, 64, 8)])
def test_a_rule_counts_from_its_first_length_to_its_most(first: int, most: int, step: int) -> None:
    lengths = Lengths(first, most, step)
    assert [count for count in range(-most, 2 * most) if count in lengths] == list(range(first, most + 1, step))


@pytest.mark.parametrize(
    ("frames", "latent_frames", "step"),
    [(9, 3, 4), (33, 5, 8), (81, 21, 4), (5, 2, 4), (1, 1, None), (None, None, None)],
)
def test_a_latent_frame_holds_what_the_students_own_length_says(
    frames: int | None, latent_frames: int | None, step: int | None
) -> None:
    student = fake_student()
    latents, image = replace(student.latents, frames=latent_frames), replace(student.image, frames=frames)
    assert frame_step(replace(student, latents=latents, image=image)) == step


@pytest.mark.parametrize(
    ("room", "step", "most"),
    [
        (None, 4, 1021),
        (None, 1, 1024),
        (10**12, 8, 1017),
        (0, 4, 1),
        (99, 4, 1),
        (100 + 7 * 13, 4, 13),
        (100 + 7 * 13 - 1, 4, 9),
    ],
)
def test_the_longest_is_one_frame_and_as_many_steps_as_fit(room: int | None, step: int, most: int) -> None:
    """Of 100 bytes for any video and 7 for each frame."""
    assert longest(room, 100, 7, step) == most


@pytest.mark.parametrize(
    "said",
    [
        None, "9", [9], [1, 9], [1, 9, 4, 1], [1, 0, 4], [1, 9, -4], [1, 9.0, 4], ["1", "9", "4"], [], {},
        {"compiled": []}, {"compiled": [0]}, {"other": [9]}, {"compiled": "9"}, {"compiled": 9},
    ],
)  # fmt: skip
def test_what_no_release_writes_is_not_read(said: object) -> None:
    assert read_lengths(said) is None


@pytest.mark.parametrize(("fit", "most"), [(0, 1), (8, 5), (9, 9), (12, 9), (25, 25)])
def test_memory_limits_the_length_at_every_size(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, fit: int, most: int
) -> None:
    """``fit``: how many frames of the larger size there is room for."""
    student = read_student(bundle)
    memory = TorchRuntime(bundle, student, 1)._model.family.video_memory
    _, fixed_bytes, frame_bytes = memory(*LARGER)
    room = fit and fixed_bytes + fit * frame_bytes
    monkeypatch.setattr(module, "_room_bytes", lambda device: room)
    monkeypatch.setattr(module, "sizes_of", lambda bundle, student: (OWN, LARGER))
    _, fixed_bytes, frame_bytes = memory(*OWN)
    own = max(
        frames for frames in range(1, LONGEST, 4) if frames <= FRAMES or fixed_bytes + frames * frame_bytes <= room
    )
    assert TorchRuntime(bundle, student, 1).lengths == {OWN: Lengths(1, own, 4), LARGER: Lengths(1, most, 4)}
