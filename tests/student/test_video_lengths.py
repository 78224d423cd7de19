"""How long a video may be at each size: as long as its memory allows, whatever the student's own length."""

from __future__ import annotations

from pathlib import Path

import pytest

from student.bundle import read_student
from student.runtimes import torch as module
from student.runtimes.lengths import LONGEST, Lengths
from student.runtimes.torch import TorchRuntime
from tests.student.families import tiny

OWN, LARGER = (32, 48), (64, 96)
FRAMES = 13


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "wan"
    tiny.build(folder, tiny.wan(), steps=(1,), height_px=OWN[0], width_px=OWN[1], frames=FRAMES)
    return folder


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
