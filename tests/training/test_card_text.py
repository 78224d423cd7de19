"""The card of a student, line by line, from figures that are known; and what stands beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rewards.weighted import Calibration, Term, Weighted
from student.bundle import ImageSize, Latents, Student
from training import card as module
from training import figures, hub
from training.card import card
from training.check_reward import Check, Climb, table
from training.config import changed
from training.evaluate import Evaluation
from training.origin import Origin
from training.rats.config import RatsConfig
from training.usage import _magic

REWARD: Any = SimpleNamespace()
PROMPTS = ["a", "b", "a"]  # the first and the third are one cluster
REWARDS = {
    "trained": Weighted((Term("trained", REWARD, 2.0, Calibration(1.0, 0.5)),)),
    "heldout": Weighted((Term("heldout", REWARD, 1.0, Calibration(0.0, 2.0)),)),
}
STUDENT = Student(
    id="cats", version="1", family="flux", steps=(2,), sigmas={2: (1.0, 0.5)}, latents=Latents(8, 8, 4, 2, 1.0, 0.0),
    image=ImageSize(64, 64), max_tokens=77, baked={}, teacher="dogs", scorers={}, chosen_at=30,
)  # fmt: skip
CONFIG = changed(RatsConfig(), {"steps": 100, "student.nfe": (2,)})
ORIGIN = Origin("dogs", "apache-2.0")


def row(label: str, nfe: int, trained: list[float], **more: Any) -> Evaluation:
    usual: dict[str, Any] = {"judge": {"right": [1.0, 0.0, 1.0], "shape": [1.0, 1.0, 1.0]}, "diversity": [2.0, 4.0]}
    scores = {"trained": trained, "heldout": [2.0, 4.0, 6.0], **more.pop("scores", {})}
    return Evaluation(label, nfe, 2.5 if label == "teacher" else 1.0, scores, **{**usual, **more})


TABLE = (row("teacher", 50, [1.0, 1.0, 1.0]), row("student", 2, [1.5, 1.0, 2.0]))


def text(**changes: Any) -> str:
    given: dict[str, Any] = {
        "student": STUDENT, "config": CONFIG, "table": TABLE, "rewards": REWARDS, "teacher": ORIGIN, "index": {},
        "alarms": (), "prompts": PROMPTS, **changes,
    }  # fmt: skip
    return card(**given)


def clustered(values: list[float]) -> tuple[float, float]:
    """Two clusters, of the first and third value and of the second."""
    mean = sum(values) / 3
    sums = [values[0] + values[2] - 2 * mean, values[1] - mean]
    return mean, math.sqrt(2 * (sums[0] ** 2 + sums[1] ** 2)) / 3


def test_the_tables_have_each_figure_with_its_error_clustered_by_prompt() -> None:
    """Twice the score's deviations above the mean: 2 (raw - 1) / 0.5."""
    lines = text().splitlines()
    head = "| model | NFE | guidance | scorer (trained on) | held-out scorer | fully right | shape | diversity |"
    at = lines.index(head)
    assert lines[at + 1] == "|---" * 8 + "|"
    trained = "{:.3f} ± {:.3f}".format(*clustered([2.0, 0.0, 4.0]))
    heldout = "{:.3f} ± {:.3f}".format(*clustered([1.0, 2.0, 3.0]))
    right = "{:.3f} ± {:.3f}".format(*clustered([1.0, 0.0, 1.0]))
    rest = f"{heldout} | {right} | 1.000 ± 0.000 | 3.000 ± 1.000 |"
    assert lines[at + 2] == f"| teacher | 50 | 2.5 | 0.000 ± 0.000 | {rest}"
    assert lines[at + 3] == f"| student | 2 | 1 | {trained} | {rest}"
    at = lines.index("| figure | 2 steps |")
    difference = "{:+.3f} ± {:.3f}".format(*clustered([2.0, 0.0, 4.0]))
    assert lines[at + 2] == f"| scorer (trained on) | {difference} |"
    assert lines[at + 3] == "| held-out scorer | +0.000 ± 0.000 |" and lines[at + 6].startswith("| diversity | +0.000")


def test_a_reward_that_reports_and_another_diversity_have_columns_of_their_own() -> None:
    rewards = {**REWARDS, "reported": Weighted((Term("reported", REWARD, 1.0, Calibration(3.0, 1.0)),))}
    more = {"scores": {"reported": [3.0, 4.0, 5.0]}, "diversities": {"diversity_dinov2": [1.0, 2.0]}}
    found = text(table=tuple(row(one.label, one.nfe, [1.0] * 3, **more) for one in TABLE), rewards=rewards)
    assert "| held-out scorer | scorer that only reports | fully right |" in found
    assert "| diversity | diversity (DINOv2) |" in found and "| 1.500 ± 0.500 |" in found
    assert f"({2} prompts) on autoencoder latents, diversity (DINOv2) that on its features" in found


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, "# cats: a 2-step student trained with RATS", "Not better than its start"),
        (
            {},
            "Student of `dogs`, trained by fewstep with reward-aware trajectory shaping (RATS, arXiv 2604.14910).",
            "A short",
        ),
        (
            {},
            "3 held-out test prompts, prompt i with seed i; mean ± standard error, clustered by prompt.",
            "A short run",
        ),
        (
            {},
            "The checkpoint (after 30 of 100 steps) was chosen by the held-out scorer on validation prompts; the",
            "x",
        ),
        ({}, "**Evaluated on 3 prompts only.**", "It began as"),
        ({}, "Signs of reward hacking: none.", "whose terms hold"),
        ({"alarms": ["one", "two"]}, "Signs of reward hacking: one; two.", "hacking: none"),
        ({"student": replace(STUDENT, chosen_at=0)}, "**Not better than its start: no checkpoint of the run had", "x"),
        (
            {"student": replace(STUDENT, chosen_at=None)},
            "It samples without guidance: one call per step.",
            "Not better",
        ),
        (
            {"student": replace(STUDENT, baked={"guidance_scale": 3.5})},
            "takes a guidance of 3.5 as an input",
            "without guidance",
        ),
        ({"student": replace(STUDENT, baked={"guidance_scale": 1.0})}, "It samples without guidance", "as an input"),
        (
            {"config": changed(CONFIG, {"steps": 49})},
            "**A short run: 49 steps, evaluated on 3 prompts only.**",
            "**Eval",
        ),
        (
            {"config": changed(CONFIG, {"student.init": "owner/fast"})},
            "It began as `owner/fast`, whose terms hold",
            "x",
        ),
        ({"config": changed(CONFIG, {"method": "tune"})}, "student tuned by a reward", "trained with RATS"),
        ({"config": changed(CONFIG, {"student.nfe": (2, 4)})}, "# cats: a 2 or 4-step student", "2-step student t"),
        ({"table": tuple(replace(one, judge={}) for one in TABLE)}, "on validation prompts. Diversity", "exact judge"),
    ],
)
def test_a_card_says_what_is_and_not_what_is_not(changes: dict[str, Any], said: str, unsaid: str) -> None:
    found = text(**changes)
    assert said in found and unsaid not in found.replace("x", "y")


def test_the_cards_front_matter_and_configuration_are_the_runs() -> None:
    found = text()
    front = found.split("---\n")[1]
    for line in ("license: apache-2.0", "library_name: diffusers", "pipeline_tag: text-to-image", "base_model: dogs"):
        assert line in front.splitlines()
    assert [tag in front for tag in ("- few-step", "- rats", "- fewstep")] == [True] * 3
    assert json.loads(found.split("```json\n")[1].split("\n```")[0]) == json.loads(json.dumps(asdict(CONFIG)))
    order = [
        "grid.png",
        "## Evidence",
        "## Paired differences",
        "## Use",
        "## Training",
        "curves.png",
        "Signs of",
        "```json",
    ]
    assert [found.index(part) for part in order] == sorted(found.index(part) for part in order)


@pytest.mark.parametrize(
    ("sigmas", "method", "said"),
    [
        (
            {2: (1.0, 0.8)},
            "rats",
            "takes 1 of 2 steps (sigmas from 0.875 on), that for low noise the others; both were",
        ),
        (
            {2: (1.0, 0.9)},
            "rats",
            "takes 2 of 2 steps (sigmas from 0.875 on), that for low noise the others: none, so it",
        ),
        (
            {2: (1.0, 0.9)},
            "consistency",
            "takes 2 of 2 steps (sigmas from 0.875 on), that for low noise the others; both",
        ),
    ],
)
def test_which_expert_takes_which_steps_is_said(sigmas: Any, method: str, said: str) -> None:
    config = changed(CONFIG, {"method": method, "reward.weight": 1.0})
    assert said in module._experts(replace(STUDENT, sigmas=sigmas), config, {"boundary_ratio": 0.875})
    assert module._experts(STUDENT, config, {}) == ""


@pytest.mark.parametrize(
    ("family", "side", "tokens", "said"),
    [("flux", 1024, 512, False), ("flux", 512, 512, True), ("flux", 1024, 256, True), ("sd3", 512, 77, False)],
)
def test_what_diffusers_defaults_would_do_is_said_where_they_would_do_it(
    family: str, side: int, tokens: int, said: bool
) -> None:
    student = replace(STUDENT, family=family, image=ImageSize(side, side), max_tokens=tokens)
    assert ("must be passed" in _magic(student)) is said


def test_a_video_is_shown_by_its_middle_frame_and_a_grid_is_as_wide_as_its_longest_row(tmp_path: Path) -> None:
    video = torch.arange(5.0)[None, :, None, None, None].expand(2, 5, 3, 4, 4)
    assert (figures.still(video) == 2).all() and figures.still(video).shape == (2, 3, 4, 4)
    assert figures.still(video[:, 0]) is not None and torch.equal(figures.still(video[:, 1]), video[:, 1])
    figures.grid({"teacher": torch.rand(3, 3, 8, 8), "student": torch.rand(2, 3, 8, 8)}, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_what_a_run_uploads_is_its_card_its_figures_and_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    api = SimpleNamespace(
        create_repo=lambda *given, **named: asked.append((given, named)),
        upload_folder=lambda **named: asked.append(named),
    )
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    (tmp_path / "adapter").mkdir()
    hub.push(tmp_path, "me/cats")
    patterns = ["README.md", "student.json", "calibration.txt", "*.png", "LICENSE*", "adapter/*"]
    upload = {"repo_id": "me/cats", "folder_path": tmp_path, "allow_patterns": patterns, "ignore_patterns": ["run/*"]}
    assert asked == [(("me/cats",), {"exist_ok": True}), upload]
    (tmp_path / "base.json").write_text("{}")  # a bundle of the adapter alone is uploaded whole
    hub.push(tmp_path, "me/cats")
    assert asked[-1] == {**upload, "allow_patterns": None}


def climb(*rises: float) -> Climb:
    return Climb(2.0, torch.tensor([0.5, 1.5]), torch.tensor(rises))


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (Check("r", [1.0, 2.0], True, [0.1, 0.2], climb(0.1, 0.2)), None),
        (Check("r", [1.0, 2.0], False, [0.0, 0.2], climb(0.1, 0.2)), "the gradient of reward 'r' is not finite"),
        (Check("r", [1.0, 2.0], True, [0.0, 0.2], climb(0.1, 0.2)), "is zero for 1 of 2 pictures"),
        (Check("r", [1.0, 2.0], True, [0.1, 0.2], climb(0.1, 0.0)), "does not raise 1 of 2 pictures' scores"),
    ],
)
def test_a_check_names_its_problem_and_shows_its_figures(found: Check, problem: str | None) -> None:
    said = found.problem()
    assert said is None if problem is None else problem in str(said)
    shown = table(found)
    values = dict(zip(*(column._cells for column in shown.columns), strict=True))
    assert values["mean score"] == "1.5" and values["step size (largest change of a pixel)"] == "2.0/255"
    assert values["predicted rise of the score, mean"] == "1"
    rose = sum(float(value) > 0 for value in found.climb.rise_B)
    assert values["pictures whose score rose"] == f"{rose} of 2"
