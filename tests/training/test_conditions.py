"""Prompts are encoded once, for all processes and for a run that goes on; what is kept is what was encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from student.families.family import Condition
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.conditions import Conditions

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
