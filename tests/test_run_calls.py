"""The calls of the transformer that docs/cost.md counts, in closed form."""

from __future__ import annotations

from benchmarks.full_size import MODELS
from benchmarks.run_calls import EMBEDDED, Calls, count, row, table
from student.families.flux import Flux
from training.experiment.presets import PRESETS


def test_guidance_that_is_an_input_takes_no_second_call() -> None:
    assert {name for name, model in MODELS.items() if issubclass(model.family, Flux)} == EMBEDDED
    config = PRESETS["flux-dev"]()
    assert config.teacher.guidance != 1.0
    own = count(config, embedded=True)
    assert own == Calls(208_000, 3_200, 3_200, 3_672, 21_952) and round(own.share, 3) == 0.133
    assert count(config, embedded=False).calibration == 2 * own.calibration


def test_every_published_preset_has_a_row() -> None:
    named = {line.split("`")[1] for line in table().splitlines()[2:]}
    assert set(MODELS) <= named and not {name for name in named if name.startswith("shapes")}
    assert row("z-image-turbo") == "| `z-image-turbo` | 89,600 | 1,024 | 2,048 | 19,584 | 16,512 | 30 % | 12 % |"


def test_a_guided_frozen_teacher_takes_two_calls_a_step_until_it_is_the_students_average() -> None:
    """Wan: 4 samples in each of 400 steps; half of the time 50 steps of two calls, then of one; 8 of the student."""
    wan = count(PRESETS["wan-1.3b"](), embedded=False)
    assert wan.training == 4 * (200 * 50 * 2 + 200 * 50 + 400 * 8 * 5)
    assert wan.validations == 9 * 8 * (64 + 8 * 8 + 8)
    assert wan.evidence == (128 + 8 * 8 + 8) * (2 * 50 + 2 * 8 + 8)
    assert (wan.calibration, wan.diversity) == (64 * 100, 8 * 8 * 100)
    assert count(PRESETS["wan-14b"](), embedded=False) == wan
