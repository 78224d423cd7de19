"""How the laboratory's teachers are distilled, what its references are of, and what its command prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.training.shapes import small
from tests.training.test_lab import _figures
from training.lab import __main__ as command
from training.lab import references, stops, teachers
from training.optim import one_cycle
from training.shapes import world
from training.shapes.acceptance import scenes_of
from training.shapes.teacher import TeacherConfig

CONFIG = teachers.TeachersConfig(distil_steps=40, distil_lr=0.02, swap_steps=9, batch=4, seed=6, save_every=5)


@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_a_teacher_is_distilled_into_a_copy_whose_text_encoders_stay(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The good one on the world's scenes as a teacher sees them; the other one on captions, some of them swapped."""
    small.write_models(tmp_path)
    kept: dict[str, Any] = {}

    def fit(label: str, path: Path, model: Any, optimizer: Any, loss: Any, lr: Any, num: int, **every: int) -> None:
        kept.update(label=label, path=path, model=model, optimizer=optimizer, lr=lr, num=num, every=every)
        path.write_text("a checkpoint")

    def distillation(guided: Any, parts: Any, source: Any, config: Any) -> Callable[[int], Tensor]:
        kept.update(guided=guided, parts=parts, source=source, config=config)
        return lambda step: torch.zeros(())

    monkeypatch.setattr(teachers, "fit", fit)
    monkeypatch.setattr(teachers, "distillation", distillation)
    monkeypatch.setattr(teachers.teacher, "LatentSource", lambda vae, config: config)
    monkeypatch.setattr(teachers, "_write", lambda parts, vae, path: kept.update(written=(parts, path)))
    teachers._distilled(name, tmp_path / "shapes-teacher", tmp_path, CONFIG)
    guided, parts = kept["guided"], kept["parts"]
    assert kept["model"] is parts.transformer is not guided.transformer and kept["config"] is CONFIG
    [group] = kept["optimizer"].param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.9, 0.98), 0.0)
    assert [id(p) for p in group["params"]] == [id(p) for p in parts.transformer.parameters()]
    learns = {
        part: {p.requires_grad for p in getattr(parts, part).parameters()} for part in ("transformer", "clip", "t5")
    }
    assert learns == {"transformer": {True}, "clip": {False}, "t5": {False}}
    assert not any(p.requires_grad for p in guided.modules().parameters())
    assert (kept["label"], kept["path"], kept["num"]) == (f"{name} teacher", tmp_path / f"{name}.pt", 40)
    assert kept["every"]["save_every"] == 5
    assert [kept["lr"](step) for step in (0, 20, 39)] == [one_cycle(step, 40, 0.02) for step in (0, 20, 39)]
    mixture = teachers._flow_matching(CONFIG)
    assert kept["source"] == (TeacherConfig(batch=4, seed=6) if name == teachers.GOOD else mixture)
    assert mixture.swapped == 0.6 and kept["written"] == (parts, tmp_path / name)
    assert not (tmp_path / f"{name}.pt").exists()


def test_references_are_the_worlds_truth_once_and_each_teacher_at_its_full_step_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a red star", "a blue ring"]
    roles: list[str] = []
    seen: dict[str, list[Any]] = {"prepared": [], "drawn": [], "images": []}

    def prepare(config: Any) -> Any:
        seen["prepared"].append(config.model)

        @contextmanager
        def role(name: str) -> Iterator[None]:
            roles.append(name)
            yield
            roles.append(f"end of {name}")

        return SimpleNamespace(
            config=config, model=SimpleNamespace(vae="vae"), roles=SimpleNamespace(role=role),
            prompts=SimpleNamespace(test=texts, validation=["v"]),
            sampler=lambda model, label, nfe: (label, nfe),
        )  # fmt: skip

    def drawn(setup: Any, sampler: Any) -> stops.Figures:
        assert roles[-1] == "start", "as the frozen start"
        seen["drawn"].append((setup.config.model, sampler))
        return _figures([0.25 * len(seen["drawn"])] * 2, [2.0, 3.0])

    def of_images(setup: Any, images: Tensor) -> stops.Figures:
        seen["images"].append(images)
        return _figures([float(len(seen["images"]))] * 2, [1.0, 1.0])

    def round_trip(vae: str, part: Tensor) -> Tensor:
        assert vae == "vae" and len(part) <= 3
        return part / 2

    for name, made in (("prepare", prepare), ("drawn", drawn), ("of_images", of_images), ("round_trip", round_trip)):
        monkeypatch.setattr(references, name, made)
    configs: Any = {
        name: SimpleNamespace(
            model=name, teacher=SimpleNamespace(reference_nfe=8, nfe=4), validation=SimpleNamespace(batch=3)
        )
        for name in teachers.TEACHERS
    }
    found = references.measure(tmp_path / "lab" / "references.json", configs)
    assert {name: figures.right[0] for name, figures in found.items()} == {
        "rendered truth": 1.0, "truth through the autoencoder": 2.0, "good teacher": 0.25, "heterogeneous teacher": 0.5,
    }  # fmt: skip
    assert seen["prepared"] == ["good", "heterogeneous"]
    assert seen["drawn"] == [("good", ("teacher", 8)), ("heterogeneous", ("teacher", 8))]
    truth, through = seen["images"]
    each = [text for text in texts for _ in range(stops.SEEDS_EACH)]
    assert torch.equal(truth, world.render_NCHW(scenes_of(each, references.SCENES))) and torch.equal(through, truth / 2)
    assert not torch.equal(truth[0], truth[1]), "each time at another place"
    prompts, again = references.read(tmp_path / "lab" / "references.json")
    assert prompts == texts and again == found
    monkeypatch.setattr(references, "prepare", lambda config: pytest.fail("they were measured again"))
    assert references.measure(tmp_path / "lab" / "references.json", configs) == found


def printed(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> list[list[str]]:
    """The cells of a table's rows."""
    console = Console(record=True, width=300, file=open("/dev/null", "w"))
    monkeypatch.setattr(command, "console", console)
    call()
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    console.file.close()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_check_prints_the_means_of_each_stopping_time(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = stops.Figures([1.0, 0.0, 0.0, 1.0], [0.25] * 4, [0.5, 1.0, 0.5, 1.0], [2.0, 3.0, 4.0, 3.0])
    some = [stops.Stop(30, nfe, 9.0, replace(figures, right=[nfe / 4] * 4)) for nfe in (1, 2)]
    assert printed(monkeypatch, lambda: command._print_check(some)) == [
        ["30", "1", "0.250", "0.250", "0.750", "3.000"], ["30", "2", "0.500", "0.250", "0.750", "3.000"],
    ]  # fmt: skip


def test_the_plan_prints_each_runs_minutes_and_which_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells: Sequence[Any] = [
        SimpleNamespace(key="one", part="main", expected_s=90.0),
        SimpleNamespace(key="two", part="check", expected_s=3600.0),
    ]  # fmt: skip
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "result.json").write_text("{}")
    rows = printed(monkeypatch, lambda: command._print_plan(cells, tmp_path))
    assert rows == [["one", "main", "1.5", ""], ["two", "check", "60.0", "yes"]]
