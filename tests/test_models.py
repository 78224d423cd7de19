"""The models that the repository ships: whole, small enough, and drawing what their cards say."""

from pathlib import Path

import numpy as np
import pytest

from student.bundle import read_student
from student.files import verify_files

MODELS = Path(__file__).resolve().parents[1] / "models"
STUDENT = MODELS / "shapes"
PROMPTS = ["a red heart above a blue star", "a small green ring on a navy background", "whatever this may be"]
SEEDS = [7, 8, 2**32 - 1]


def test_the_starter_student_is_what_its_manifest_says() -> None:
    student = read_student(STUDENT)
    verify_files(STUDENT, student)
    assert (student.id, student.steps) == ("shapes", (4, 1, 2, 8))
    assert set(student.scorers) == {"trained", "heldout"}


def test_all_models_are_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 45e6


def test_cards_and_pictures_are_there() -> None:
    card = (STUDENT / "README.md").read_text()
    assert "270 held-out test prompts" in card and "| teacher | 25 |" in card and "| student | 4 |" in card
    assert (STUDENT / "grid.png").is_file() and (STUDENT / "curves.png").is_file()
    assert "Measured on 270 held-out test prompts" in (MODELS / "shapes-teacher" / "README.md").read_text()


@pytest.fixture(scope="module")
def served() -> np.ndarray:
    from student.runtimes.load import load

    return load(STUDENT, "onnx", threads=1).draw(PROMPTS, SEEDS, 4)


def test_diffusers_reproduces_what_is_served(served: np.ndarray) -> None:
    from student.pipeline import open_pipeline, reproduce

    again = reproduce(open_pipeline(STUDENT), read_student(STUDENT), PROMPTS, SEEDS, 4)
    assert np.abs(again - served).max() <= 2 / 255


def test_the_starter_student_draws_the_colours_it_was_asked_for() -> None:
    """A floor far below the card's figure: it fails for a student of noise, not for a slightly better or worse one."""
    from student.runtimes.load import load
    from training.shapes.grammar import parse
    from training.shapes.judge import judge_batch, summary

    prompts = [
        f"a large {color} circle on a {back} background" for color in ("red", "blue") for back in ("mint", "cream")
    ]
    runtime = load(STUDENT, "onnx", threads=1)
    figures = summary(judge_batch(runtime.draw(prompts, [1, 2, 3, 4], 4), [parse(prompt) for prompt in prompts]))
    assert figures["color"] >= 0.75 and figures["background"] == 1.0


def test_the_teacher_is_a_diffusers_pipeline() -> None:
    from diffusers import FluxPipeline

    from student.pipeline import open_pipeline

    assert isinstance(open_pipeline(MODELS / "shapes-teacher"), FluxPipeline)
