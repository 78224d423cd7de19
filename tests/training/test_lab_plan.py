"""The laboratory's plan, teachers and report by their numbers: as docs/science.md registers them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from tests.training.test_lab import PROMPTS, _figures, _outcome, _run
from training.config import changed, leaves
from training.experiment.presets import shapes
from training.lab import cells, plots, references, report, run, stops, teachers
from training.lab.gates import OTHERS, SWAPPED
from training.lab.outcome import HIGH, LOW
from training.lab.stops import FIRST_SEED, SEEDS_EACH, Stop
from training.lab.teachers import TeachersConfig
from training.rats.config import RatsConfig
from training.shapes import teacher, vocabulary

SHARED = {
    "model": "t/good", "student.id": "lab", "student.nfe": (1, 2), "steps": cells.STEPS, "teacher.nfe": 4,
    "teacher.reference_nfe": 8, "teacher.guidance": 1.0, "teacher.guided_steps": cells.STEPS // 2,
    "teacher.restart": False, "teacher.ema": 0.99, "gate.tau": 0.5, "gate.tau_in_std": True, "optim.batch": 64,
    "optim.lr": cells.LR, "optim.decay": 0.0, "validation.every": cells.EVERY, "validation.batch": 64,
    "validation.min_diversity": 0.0, "data.validation": 64, "data.validation_diversity": 4, "data.test": 128,
    "compute.save_minutes": 10_000.0,
}  # fmt: skip
METHODS: Mapping[str, Mapping[str, Any]] = {
    "RATS": {}, "constant gate": {"gate.kind": "constant"}, "shuffled gate": {"gate.kind": "shuffled"},
    "reward only": {}, "batch-mean gate": {"gate.kind": "batch_mean"}, "signed weight": {"gate.kind": "signed"},
    "disagreement gate": {"gate.kind": "disagreement"},
    "distillation only": {"reward.weight": 0.0, "gate.kind": "one"}, "confidence gate": {"gate.kind": "confidence"},
}  # fmt: skip


def test_what_all_runs_share_is_the_starter_worlds_run_with_these_settings() -> None:
    assert cells.base(Path("t/good")) == changed(shapes(), SHARED)
    assert cells.STEPS % cells.EVERY == 0, "the last step is a stopping time"


def test_a_sweep_is_over_alpha_or_over_what_takes_its_place() -> None:
    swept: dict[str, list[tuple[float, float]]] = {}
    for cell in cells.cells(Path("t")):
        own = {**SHARED, **METHODS[cell.method], "model": f"t/{cell.teacher}", "seed": cell.config.seed}
        alpha, rate = cell.config.shaping.alpha, cell.config.optim.lr
        assert cell.config == changed(shapes(), {**own, "shaping.alpha": alpha, "optim.lr": rate}), cell.key
        if (cell.teacher, cell.config.seed) == ("heterogeneous", 401):
            swept.setdefault(cell.method, []).append((alpha, rate / cells.LR))
    over_alpha = [(2.0, 1.0), (8.0, 1.0), (20.0, 1.0)]
    expected = {name: over_alpha for name in METHODS}
    expected |= {"reward only": [(0.0, 0.5), (0.0, 1.0), (0.0, 2.0)], "distillation only": [(8.0, 1.0)]}
    assert swept == expected
    keys = [cell.key for cell in cells.cells(Path("t"))]
    assert {"good-reward-only-rate-0.5-seed405", "heterogeneous-distillation-only-seed401"} <= set(keys)


def test_what_a_run_takes_is_its_steps_its_teacher_and_its_validations() -> None:
    by_key = {cell.key: cell for cell in cells.cells(Path("t"))}
    validations = (1 + cells.STEPS / cells.EVERY) * cells.VALIDATION_S
    shaped, alone = by_key["good-rats-alpha-8-seed401"], by_key["good-reward-only-rate-1-seed401"]
    assert alone.expected_s == pytest.approx(cells.SETUP_S + cells.STEPS * cells.STUDENT_S + validations)
    assert shaped.expected_s - alone.expected_s == pytest.approx(cells.STEPS * cells.TEACHER_S)


def test_the_check_is_of_the_strongest_reward_only_with_a_seed_and_prompts_of_its_own() -> None:
    cell = cells.check(Path("t"))
    own = {"seed": 400, "shaping.alpha": 0.0, "optim.lr": 2 * cells.LR, "data.validation": 128}
    assert cell.config == changed(shapes(), {**SHARED, "model": "t/heterogeneous", **own}) and cell.part == "check"
    short = run.shortened(cell, 5)
    differing = {"steps": 5, "validation.every": 2, "teacher.guided_steps": 2}
    assert dict(leaves(short.config)) == {**dict(leaves(cell.config)), **differing}
    assert run.shortened(cell, 1).config.validation.every == 1


def test_the_references_are_measured_as_the_runs_are() -> None:
    found = references.configs(Path("t"))
    assert found == {n: changed(cells.base(Path("t") / n), {"seed": 401}) for n in ("good", "heterogeneous")}
    assert {config.steps for config in references.configs(Path("t"), 7).values()} == {7}


def test_the_teachers_are_those_that_were_registered() -> None:
    assert asdict(TeachersConfig()) == {
        "start": "models/shapes-teacher", "guidance": 2.5, "swapped": 0.6, "swap_steps": 800, "swap_lr": 5e-4,
        "distil_steps": 300, "distil_lr": 3e-4, "batch": 64, "seed": 311, "save_every": 50,
    }  # fmt: skip
    short = TeachersConfig().shortened(3)
    assert short == replace(TeachersConfig(), swap_steps=3, distil_steps=3)
    found = teachers._flow_matching(replace(TeachersConfig(), start="s", batch=8, save_every=9))
    assert found == teacher.TeacherConfig(steps=800, batch=8, lr=5e-4, start="s", swapped=0.6, seed=311, save_every=9)


def test_a_network_learns_the_guided_velocity_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """without + w (v - without), at times that are uniform, from one noise for both."""
    asked: list[tuple[str, Tensor, Tensor, Tensor, bool]] = []
    config = TeachersConfig(guidance=3.0, seed=5)
    tokenizer = vocabulary.tokenizer()
    data = torch.randn(600, 2, 3, generator=torch.Generator().manual_seed(1))
    texts = ["a red heart", "a blue star"] * 300

    def velocity(parts: Any, x: Tensor, sigma_B: Tensor, ids_BL: Tensor) -> Tensor:
        asked.append((parts, x, sigma_B, ids_BL, torch.is_grad_enabled()))
        words = ids_BL.float().sum(1)[:, None, None]
        return (0.5 * x + words) if parts == "guided" else (2 * x).requires_grad_()

    monkeypatch.setattr(teachers.teacher, "velocity", velocity)
    source: Any = SimpleNamespace(batch=lambda step: (data, texts))
    ours: Any = "ours"
    guided: Any = "guided"
    loss = teachers.distillation(guided, ours, source, config)
    found = loss(3)
    (_, twice, times, ids, learns), (_, x, sigma_B, own, learnt) = asked
    assert torch.equal(twice, torch.cat([x, x])) and torch.equal(times, torch.cat([sigma_B, sigma_B]))
    assert torch.equal(ids[:600], own) and not learns and learnt
    empty = torch.tensor(vocabulary.encode(tokenizer, [""]))
    assert torch.equal(ids[600:], empty.expand(600, -1))
    noise = (x - (1 - sigma_B)[:, None, None] * data) / sigma_B[:, None, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.1) and 0 <= sigma_B.min() < 0.01 and 0.99 < sigma_B.max() < 1
    assert float(sigma_B.mean()) == pytest.approx(0.5, abs=0.04)
    v, without = (0.5 * x + part.float().sum(1)[:, None, None] for part in (own, empty.expand(600, -1)))
    assert float(found.detach()) == pytest.approx(
        float((2 * x - (without + 3.0 * (v - without))).square().mean()), rel=1e-5
    )
    loss(3), loss(4)
    assert torch.equal(asked[3][1], x) and not torch.equal(asked[5][1], x)


def test_a_teacher_is_checked_on_the_validation_prompts_by_stratum(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    texts = ["a red star", "a blue ring", "a red heart", "a black cross", "a star that is left out"]
    monkeypatch.setattr(teachers, "CHECKED_PROMPTS", 4)
    monkeypatch.setattr(teachers.prompts, "measuring_prompts", lambda: (["c"], texts, ["t"]))
    model = SimpleNamespace(latent_shape=lambda *size: size, sigmas=lambda nfe, shape: (nfe, shape))
    monkeypatch.setattr(teachers, "open_family", lambda *given, **options: (drawn.append((given, options)), model)[1])

    class Drawing:
        def __init__(self, *given: Any) -> None:
            drawn.append(given)

        def draw(self, *given: Any) -> str:
            drawn.append(given)
            return "images"

    answers = {
        "a red star": 0.0, "a blue ring": 1.0, "a red heart": 1.0, "a black cross": 1.0, "a blue star": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(teachers, "Sampler", Drawing)
    monkeypatch.setattr(
        teachers, "judge_prompts", lambda images, asked: {"right": [answers.get(t, 0.0) for t in asked]}
    )
    found = teachers.checked(Path("x"), guidance=2.0)
    assert found == pytest.approx({"right": 0.75, "right_swapped": 0.5, "right_others": 1.0, "exchanged": 0.5})
    assert drawn[1] == (model, (8, (64, 64)), 2.0)
    assert drawn[2] == (texts[:4], range(4), (64, 64), 64) and drawn[0][1]["max_tokens"] == vocabulary.MAX_TOKENS


def test_figures_are_of_four_pictures_of_each_prompt_from_noise_that_no_run_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stops, "move", lambda *given: None)
    seen: list[Any] = []

    def over_pictures(sampler: Any, texts: Any, seeds: Any, shape: Any, batch: int, work: Any) -> list[Any]:
        seen.append((texts, list(seeds), shape, batch))
        return [work(at, torch.arange(at, at + 4.0), texts[at : at + 4]) for at in range(0, len(texts), 4)]

    def judge(images: Tensor, texts: list[str]) -> dict[str, list[float]]:
        return {"right": [float(value % 2) for value in images]}

    monkeypatch.setattr(stops, "over_pictures", over_pictures)
    scorers = {"trained": lambda images, texts: images / 8, "heldout": lambda images, texts: -images}
    features = {0: torch.eye(4), 1: torch.ones(4, 4)}
    measure = SimpleNamespace(judge=judge, scorers=scorers, features=lambda images: features[int(images[0]) // 4])
    setup: Any = SimpleNamespace(
        measure=measure, rewards=None, model=SimpleNamespace(device="cpu"), latents=SimpleNamespace(shape=(1, 2, 3)),
        prompts=SimpleNamespace(test=["a", "b"]), config=SimpleNamespace(validation=SimpleNamespace(batch=9)),
    )  # fmt: skip
    found = stops.drawn(setup, "sampler")  # type: ignore[arg-type]
    assert seen == [(["a"] * 4 + ["b"] * 4, [3_000_000 + k for k in range(8)], (1, 2, 3), 9)]
    assert (FIRST_SEED, SEEDS_EACH) == (3_000_000, 4) and found.right == [0.5, 0.5]
    assert (found.trained, found.heldout) == ([1.5 / 8, 5.5 / 8], [-1.5, -5.5])
    assert found.diversity == pytest.approx([4.0, 1.0])


def gated(method: str, seed: int, points: list[tuple[int, float, float, float]], gate: Any) -> run.Result:
    made = _run(method, seed, points, "heterogeneous")
    return replace(made, stops=[replace(stop, gate=gate if stop.step else {}) for stop in made.stops])


NOTED = {SWAPPED: {"weight": 0.25, "gap": -0.5}, OTHERS: {"weight": 0.75, "gap": 1.5}}
POINTS = [(0, 0.1, 2.0, 0.0), (30, 0.9, 1.5, 0.9), (60, 0.6, 1.0, 0.5)]


def test_the_report_names_the_best_stopping_time_and_the_last_one_and_the_gates_means(tmp_path: Path) -> None:
    other = {SWAPPED: {"weight": 0.75, "gap": 0.5}, OTHERS: {"weight": 0.25, "gap": 0.5}}
    rows = [
        gated("RATS", 401, POINTS, NOTED),
        gated("RATS", 402, POINTS, other),
        _run("reward only", 401, POINTS, "heterogeneous"),
    ]
    found = _outcome(rows)
    report.write(found, tmp_path, 0, {})
    text = (tmp_path / "README.md").read_text()
    assert "3 runs took 0.1 core-hours." in text and "missing" not in text, "of a minute each"
    assert "| heterogeneous |  | 401 | 1 | 0.900 | 30 | 0.600 | 60 |" in text
    assert "| heterogeneous |  | 401 | 2 | 0.900 | 30 | 0.600 | 60 |" in text
    assert "| heterogeneous | RATS | +0.50 | +0.50 | +0.00 | +1.00 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| RATS | 2 |"))
    assert line.endswith("| 0.900 | 0.500 | 0.250 |"), "the best of those that are varied enough"
    assert "The teacher on the validation prompts: not checked." in text
    csv = (tmp_path / "areas.csv").read_text().splitlines()
    assert csv[0].startswith("teacher,method,seed,") and [
        row for row in csv if row.startswith("heterogeneous,RATS,401,")
    ]


def test_a_curve_is_the_mean_envelope_of_the_seeds_and_lines_are_the_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    rows = [_run("RATS", 401, POINTS, "heterogeneous"), _run("RATS", 402, [(30, 0.5, 2.0, 0.0)], "heterogeneous")]
    plots.curves(_outcome(rows), "heterogeneous", Path("x"))
    [figure] = kept
    first = figure.axes[0]
    lines = {line.get_label(): line for line in first.lines}
    shares, heights = lines["RATS (2)"].get_data()
    at = dict(zip(np.round(shares, 6), heights, strict=True))
    # The first seed: 0.1 up to the teacher's own diversity, 0.9 up to three quarters of it; the second: 0.5 everywhere.
    assert at[0.75] == pytest.approx((0.9 + 0.5) / 2) and at[1.0] == pytest.approx((0.1 + 0.5) / 2) and at[1.05] == 0
    assert lines["rendered truth"].get_ydata()[0] == 1.0
    assert lines["truth through the autoencoder"].get_ydata()[0] == 0.96
    star = lines["its teacher"]
    assert (float(star.get_xdata()[0]), float(star.get_ydata()[0])) == (1.0, 0.7)
    assert len(figure.axes) == 2 * 3 and first.get_title() == "both, 1 step" and (LOW, HIGH) == (0.7, 1.0)
    plt.close(figure)


def test_the_plot_of_gates_is_the_mean_over_the_runs_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    other = {SWAPPED: {"weight": 0.75, "gap": 0.5}}
    plots.gates(_outcome([gated("RATS", 401, POINTS, NOTED), gated("RATS", 402, POINTS, other)]), Path("x"))
    [figure] = kept
    weights = {line.get_label(): line.get_data() for line in figure.axes[0].lines if line.get_linewidth() == 2}
    gaps = {line.get_label(): line.get_data() for line in figure.axes[1].lines if line.get_linewidth() == 2}
    assert weights[SWAPPED][0].tolist() == [30, 60] and weights[SWAPPED][1].tolist() == [0.5, 0.5]
    assert weights[OTHERS][1].tolist() == [0.75, 0.75] and gaps[SWAPPED][1].tolist() == [0.0, 0.0]
    rows = [gated("RATS", 401, POINTS, NOTED), gated("constant gate", 401, POINTS, NOTED)]
    plots.gates(_outcome([*rows, gated("confidence gate", 401, POINTS, other)]), Path("x"))
    both = kept[1].axes
    assert [axis.get_title() for axis in both[:2]] == [
        "RATS, heterogeneous teacher",
        "confidence gate, heterogeneous teacher",
    ]
    [line] = [line for line in both[1].lines if line.get_linewidth() == 2]
    assert line.get_label() == SWAPPED and line.get_ydata().tolist() == [0.75, 0.75]
    for one in kept:
        plt.close(one)


def test_a_stop_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = [Stop(30, nfe, 0.5, _figures([1.0, 0.0], [2.0, 3.0]), NOTED) for nfe in (1, 2)]
    stops.write(kept, tmp_path / "000030.json")
    stops.write(kept[:1], tmp_path / "000010.json")
    assert stops.read(tmp_path) == [kept[0], *kept] and len(PROMPTS) == 5
    assert json.loads((tmp_path / "000030.json").read_text())[1]["nfe"] == 2


def test_a_configuration_of_the_laboratory_is_one_of_a_run() -> None:
    assert all(isinstance(cell.config, RatsConfig) for cell in cells.cells(Path("t")))
