"""What drift is held against: every step count, each prompt once, and how many there were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.reference import FIRST_SEED, measured
from student.bundle import BundleError
from student.reference import own_reference
from student.runtimes.fake import FakeRuntime, fake_image

PROMPTS = [f"prompt {k}" for k in range(25)]


def test_each_step_count_has_a_distribution_of_its_own_and_says_of_how_many_prompts() -> None:
    runtime = FakeRuntime()
    student = replace(runtime.student, reward_reference=measured(runtime, PROMPTS))
    for steps in student.steps:
        images = [fake_image(prompt, FIRST_SEED + k, steps) for k, prompt in enumerate(PROMPTS)]
        scores = np.array([float(image[2].mean(dtype=np.float32) * 4 - 2) for image in images])
        found = own_reference(student, "heldout", steps, (64, 64))
        assert found is not None and found.count == 25
        assert (found.mean, found.std) == (
            pytest.approx(scores.mean(), abs=1e-5),
            pytest.approx(scores.std(ddof=1), abs=1e-5),
        )
        assert found.percentiles["5"] == pytest.approx(np.percentile(scores, 5), abs=1e-5)
    assert (
        own_reference(student, "heldout", 8, (64, 64)) is None and own_reference(student, "other", 4, (64, 64)) is None
    )


def test_too_few_pictures_have_no_fifth_percentile() -> None:
    with pytest.raises(BundleError, match="scored 19 pictures of 4 steps: accepted are 20 or more"):
        measured(FakeRuntime(), PROMPTS[:19])
