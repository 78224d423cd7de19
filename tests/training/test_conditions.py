"""Prompts are encoded once, for all processes and for a run that goes on; what is kept is what was encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from student.families.family import Condition, Family
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.conditions import Conditions
from training.config import changed, with_settings
from training.experiment import setup
from training.experiment.presets import preset
from training.rats.config import RatsConfig

PROMPTS = ["a red heart", "a blue star", "a ring"]


def test_what_is_kept_is_what_was_encoded_and_takes_the_encoders_place(tmp_path: Path) -> None:
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    before = model.encode(PROMPTS)
    kept = Conditions(tmp_path / "kept", [*PROMPTS, PROMPTS[0]])
    assert kept.missing() == PROMPTS
    assert (kept.missing(0, 2), kept.missing(1, 2)) == (PROMPTS[::2], PROMPTS[1::2]), "two processes share them"
    kept.encode(model, PROMPTS[1:])
    assert kept.missing() == PROMPTS[:1] and set(kept) == set(PROMPTS[1:])
    Conditions(tmp_path / "kept", PROMPTS).encode(model, PROMPTS[:1])  # another process
    assert not kept.missing() and not list((tmp_path / "kept").glob("*.part"))
    model.remember(kept)
    after = model.encode(PROMPTS)
    assert before.pooled_BP is not None and after.pooled_BP is not None
    assert torch.equal(after.tokens_BLE, before.tokens_BLE) and torch.equal(after.pooled_BP, before.pooled_BP)
    with pytest.raises(RuntimeError, match="the text encoders were dropped"):
        model.encode(["another"])


def test_the_second_run_on_the_same_prompts_asks_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    encoded: list[int] = []
    original = Conditions.encode

    def counted(self: Conditions, model: object, prompts: list[str]) -> None:
        encoded.append(len(prompts))
        original(self, model, prompts)  # type: ignore[arg-type]

    monkeypatch.setattr(Conditions, "encode", counted)
    arguments = settings(tmp_path, "sd3", steps=1)
    for name in ("one", "two"):
        code, text = run("--out", str(tmp_path / name), *arguments)
        assert code == 0, text
    assert sum(encoded[:2]) <= 17 + 8 and len(encoded) == 2, "the run's prompts, the reopened bundle's, and no more"
    other = settings(tmp_path, "sd3", steps=1, max_tokens=tiny.MAX_TOKENS + 1)
    assert run("--out", str(tmp_path / "three"), *other)[0] == 0
    assert len(encoded) == 4, "another length is another condition"


def test_a_condition_without_a_pooled_vector_is_kept_too(tmp_path: Path) -> None:
    class Reader:
        def encode(self, prompts: list[str]) -> Condition:
            tokens: Tensor = torch.arange(6.0).view(1, 2, 3).expand(len(prompts), 2, 3).bfloat16()
            return Condition(tokens)

    kept = Conditions(tmp_path, PROMPTS)
    kept.encode(Reader(), PROMPTS)  # type: ignore[arg-type]
    found = kept[PROMPTS[0]]
    assert found.pooled_BP is None and found.tokens_BLE.dtype == torch.bfloat16
    assert torch.equal(found.tokens_BLE, torch.arange(6.0).view(1, 2, 3).bfloat16())


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch's own setting, which a monkeypatch would leave deleted."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rewards_make_room_while_prompts_are_encoded_and_the_encoders_are_let_go_of_before_they_return(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device (``cpu:0`` here) never holds both; and products in fp32 are TF32's where a run computes in bf16."""
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    torch.backends.cuda.matmul.allow_tf32 = precision == "fp32"
    done: list[str] = []
    encode, place = Conditions.encode, setup.place

    def encoded(self: Conditions, model: Family, prompts: list[str]) -> None:
        done.append("encode")
        encode(self, model, prompts)

    def placed(config: RatsConfig, model: Family, names: Sequence[str] = ()) -> None:
        done.append("encoders" if names else "transformer and decoder")
        assert bool(names) == any(getattr(model, name) is not None for name in model.encoders), "let go of before"
        place(config, model, names)

    monkeypatch.setattr(Conditions, "encode", encoded)
    monkeypatch.setattr(setup, "place", placed)
    monkeypatch.setattr(setup, "move", lambda _, device: done.append(f"rewards to {device}"))
    given = [*settings(tmp_path, "sd3", precision=precision), "--set", "compute.device=cpu:0"]
    setup.prepare(with_settings(preset("shapes"), given[1::2]))
    assert done == ["rewards to cpu", "encoders", "encode", "rewards to cpu:0", "transformer and decoder"]
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "bf16")


def test_what_is_kept_of_prompts_belongs_to_the_encoders_and_to_how_they_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights, the tokenizer, the type and the kind of device: each has a folder of its own."""
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    folders: list[Path] = []

    class Noted(Conditions):
        def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
            folders.append(folder)
            super().__init__(folder, prompts)

        def missing(self, first: int = 0, every: int = 1) -> list[str]:
            return []

    monkeypatch.setattr(setup, "Conditions", Noted)

    def folder(maker: object = tiny.sd3, seed: int = 0, max_tokens: int = tiny.MAX_TOKENS, **settings: object) -> Path:
        model = family_of(maker(), max_tokens=max_tokens)  # type: ignore[operator]
        if seed:
            with torch.no_grad():
                next(model.text_encoder_3.parameters()).add_(seed)
        setup.remember(changed(RatsConfig(), {"compute.device": "cpu", **settings}), model, {}, ["a red heart"])
        return folders[-1]

    plain = folder()
    assert plain == folder() and plain.parent == tmp_path / "conditions"
    assert plain == folder(**{"optim.lr": 0.5, "steps": 7}), "nothing else of a run"
    others = [
        folder(seed=1),
        folder(max_tokens=tiny.MAX_TOKENS + 1),
        folder(tiny.flux),
        folder(**{"compute.precision": "fp32"}),
    ]
    assert plain == folder(**{"compute.device": "cpu:0"})
    gpus = {"cuda:0": "NVIDIA A", "cuda:1": "NVIDIA A", "cuda:2": "NVIDIA B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[str(device)])
    first = []
    for gpu in gpus:
        monkeypatch.setattr(setup, "_device", lambda config, gpu=gpu: gpu)
        first.append(folder())
    assert first[0] == first[1] != first[2], "processes on GPUs of one kind share the work"
    assert len({plain, *others, *first}) == 7


@pytest.mark.parametrize(("size", "index"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_processes_share_the_prompts_and_then_each_looks_for_what_it_cannot_see(
    size: int, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process encoded may lie on another machine's disk."""
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    done: list[object] = []
    processes = SimpleNamespace(size=size, index=index, wait=lambda: done.append("all are here"))
    monkeypatch.setattr(setup, "Processes", lambda: processes)
    monkeypatch.setattr(Conditions, "encode", lambda self, model, prompts: done.append(list(prompts)))
    prompts = [f"a ring number {k}" for k in range(7)]
    model = family_of(tiny.sd3(), max_tokens=tiny.MAX_TOKENS)
    setup.remember(changed(RatsConfig(), {"compute.device": "cpu"}), model, {}, prompts)
    assert done == [prompts[index::size], "all are here", prompts, "all are here"]
    assert model.text_encoder_3 is None, "the encoders are let go of"
