"""The runtime that every other test relies on to notice a mix-up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from student.runtimes.fake import FakeRuntime, fake_image, fake_student
from student.runtimes.runtime import Runtime


def test_it_is_a_runtime_with_a_manifest() -> None:
    runtime: Runtime = FakeRuntime()
    assert (runtime.name, runtime.student, runtime.max_batch) == ("fake", fake_student(), 8)


def test_a_picture_depends_on_its_own_request_alone() -> None:
    prompts, seeds = ["a", "b", "a", "c"], [1, 1, 2, 2**32 - 1]
    images_BCHW = FakeRuntime().draw(prompts, seeds, 4)
    assert images_BCHW.shape == (4, 3, 64, 64) and images_BCHW.dtype == np.float32
    assert images_BCHW.min() >= 0 and images_BCHW.max() <= 1
    for image_CHW, prompt, seed in zip(images_BCHW, prompts, seeds, strict=True):
        assert np.array_equal(image_CHW, FakeRuntime().draw([prompt], [seed], 4)[0])
        assert np.array_equal(image_CHW, fake_image(prompt, seed, 4))


def test_every_part_of_a_request_changes_the_picture() -> None:
    different = [fake_image("a", 1, 4), fake_image("b", 1, 4), fake_image("a", 2, 4), fake_image("a", 1, 2)]
    assert len({image.tobytes() for image in different}) == 4


def test_scores_belong_to_pictures() -> None:
    runtime = FakeRuntime()
    images_BCHW = runtime.draw(["a", "b"], [1, 2], 4)
    scores = runtime.score(images_BCHW, ["a", "b"])
    assert set(scores) == {"trained", "heldout"}
    for name, score_B in scores.items():
        assert score_B.shape == (2,) and score_B.dtype == np.float32
        assert score_B[1] == runtime.score(images_BCHW[1:], ["b"])[name][0]


@pytest.mark.parametrize(
    ("prompts", "seeds", "steps"),
    [
        ([], [], 4),
        (["a"], [1, 2], 4),
        (["a"] * 9, list(range(9)), 4),
        (["a"], [2**32], 4),
        (["a"], [-1], 4),
        (["a"], [1], 5),
    ],
)
def test_what_no_runtime_takes_it_does_not_take(prompts: list[str], seeds: list[int], steps: int) -> None:
    with pytest.raises(ValueError, match="accepted|as many"):
        FakeRuntime().draw(prompts, seeds, steps)


def test_it_misbehaves_on_request() -> None:
    with pytest.raises(RuntimeError):
        FakeRuntime().draw(["a", "fake:raise"], [1, 2], 4)
    images_BCHW = FakeRuntime().draw(["a", "fake:nan"], [1, 2], 4)
    assert np.isfinite(images_BCHW[0]).all() and np.isnan(images_BCHW[1]).all()


def test_a_step_takes_as_long_as_its_images_ask_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("student.runtimes.fake.time", SimpleNamespace(sleep=slept.append))
    FakeRuntime().draw(["fake:image=0.5 a", "fake:image=0.25 b", "fake:step=0.125 c"], [1, 2, 3], 2)
    assert sum(slept) == 2 * (0.5 + 0.25 + 0.125)
