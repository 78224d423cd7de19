"""A pipeline on disk: how it is opened and saved, what is said if it cannot be, and what is put back afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_log
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn
from transformers.utils import logging as transformers_log

from student import pipeline
from student.bundle import BundleError
from student.families.family import Condition, SizeError, check_size
from student.families.find import family_of, family_of_student
from student.pipeline import merge_adapter, open_parts, open_pipeline, save_pipeline, steps_at
from student.runtimes.torch_stage import TorchStage
from tests.student.families import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "flux"
    pipe = tiny.flux()
    pipe.transformer.to(torch.bfloat16)
    save_pipeline(pipe, folder, None)
    return folder


def test_a_pipeline_may_be_saved_in_the_types_that_it_has(saved: Path) -> None:
    kinds = {part: open_header(saved / part) for part in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    assert kinds == {"transformer": {"BF16"}, "vae": {"F32"}, "text_encoder": {"F32"}, "text_encoder_2": {"F32"}}
    assert json.loads((saved / "text_encoder" / "config.json").read_text("utf-8"))["dtype"] == "float32"


def open_header(folder: Path) -> set[str]:
    from student.runtimes.placement import read_header

    return {str(row["dtype"]) for file in folder.glob("*.safetensors") for row in read_header(file).values()}


def test_what_is_opened_is_for_inference_in_the_type_that_is_asked_for(saved: Path) -> None:
    pipe = open_pipeline(saved, torch.bfloat16)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert len(modules) == 4
    for module in modules:
        assert not module.training and not any(value.requires_grad for value in module.parameters())
        assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    mixed = open_pipeline(saved, {"default": torch.bfloat16, "vae": torch.float32})
    assert (mixed.vae.dtype, mixed.transformer.dtype) == (torch.float32, torch.bfloat16)
    assert open_pipeline(saved).transformer.dtype == torch.float32


def test_only_the_parts_that_are_asked_for_are_opened(saved: Path) -> None:
    pipe = open_parts(saved, ("vae", "scheduler"), torch.float32)
    assert {name for name, part in pipe.components.items() if part is not None} >= {"vae", "scheduler"}
    there = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert there == {"vae"} and pipe.tokenizer is None


def test_full_memory_is_not_called_a_broken_pipeline(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [log.get_verbosity() for log in (diffusers_log, transformers_log)]
    levels = [diffusers_log.INFO, transformers_log.ERROR]
    diffusers_log.set_verbosity(levels[0])
    transformers_log.set_verbosity(levels[1])

    def failing(error: Exception) -> Any:
        def from_pretrained(*given: Any, **options: Any) -> Any:
            raise error

        return from_pretrained

    for kept in (torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        monkeypatch.setattr(pipeline.diffusers.FluxPipeline, "from_pretrained", failing(kept))  # type: ignore[arg-type]
        with pytest.raises(type(kept)):
            open_pipeline(saved)
    for error in (
        OSError("first\nsecond"),
        ValueError("first"),
        RuntimeError("first"),
        ImportError("first"),
        TypeError("first"),
    ):
        monkeypatch.setattr(pipeline.diffusers.FluxPipeline, "from_pretrained", failing(error))
        with pytest.raises(BundleError, match=f"^{saved} cannot be opened: first$"):
            open_pipeline(saved)
    monkeypatch.setattr(pipeline.diffusers.FluxPipeline, "from_pretrained", failing(ValueError("")))
    with pytest.raises(BundleError, match=f"^{saved} cannot be opened: ValueError$"):
        open_pipeline(saved)
    found = [log.get_verbosity() for log in (diffusers_log, transformers_log)]
    diffusers_log.set_verbosity(before[0])
    transformers_log.set_verbosity(before[1])
    assert found == levels, "other code's logs are its own"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "it is gated; accept its licence at"),
        (RepositoryNotFoundError, "none of that name exists, or it is gated or private"),
    ],
)
@pytest.mark.parametrize("how", ["itself", "cause", "context"])
def test_a_refusal_of_the_hub_is_found_behind_whatever_is_raised_for_it(kind: Any, said: str, how: str) -> None:
    first = kind("401", response=SimpleNamespace(headers={}, status_code=401, request=None))
    second = first
    if how == "cause":
        second = OSError("something else")
        second.__cause__ = first
    if how == "context":
        second = OSError("something else")
        second.__context__ = first
    with pytest.raises(BundleError, match=said) as caught, pipeline._opening("owner/name"):
        raise second
    assert "https://huggingface.co/owner/name" in str(caught.value)


def test_the_pipelines_own_scheduler_is_put_back_also_after_a_failure() -> None:
    pipe = SimpleNamespace(scheduler="its own")
    with pytest.raises(InterruptedError), steps_at(pipe, (1.0, 0.7, 0.2)):
        pipe.scheduler.set_timesteps(50, device="cpu")  # type: ignore[attr-defined]
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.7, 0.2, 0.0])  # type: ignore[attr-defined]
        raise InterruptedError
    assert pipe.scheduler == "its own"


class Adapted:
    """A pipeline of two experts that notes how a LoRA is merged into it."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = nn.Dropout().train(), nn.Dropout().train()
        self.calls: list[Any] = []

    def load_lora_weights(self, folder: Path, **options: Any) -> None:
        self.calls.append(("load", folder, options))

    def fuse_lora(self, components: list[str]) -> None:
        self.calls.append(("fuse", components))

    def unload_lora_weights(self) -> None:
        self.calls.append("unload")


@pytest.mark.parametrize("second", [False, True])
def test_each_experts_adapter_is_merged_into_its_own_network(tmp_path: Path, second: bool) -> None:
    pipe = Adapted()
    if second:
        (tmp_path / "transformer_2").mkdir()
    merge_adapter(pipe, tmp_path, "a.safetensors")
    expected: list[Any] = [("load", tmp_path, {"weight_name": "a.safetensors"}), ("fuse", ["transformer"]), "unload"]
    if second:
        options = {"weight_name": "a.safetensors", "load_into_transformer_2": True}
        expected += [("load", tmp_path / "transformer_2", options), ("fuse", ["transformer_2"]), "unload"]
    assert pipe.calls == expected and not pipe.transformer.training and pipe.transformer_2.training is not second


def student_of(pipe: Any, **changes: Any) -> Any:
    family = family_of(pipe)
    return replace(tiny.manifest(family, (2,), family.geometry(64, 32)), **changes)


NO_GUIDANCE: dict[str, dict[str, float]] = {
    "flux2": {"guidance_scale": 1.0}, "sd3": {"guidance_scale": 1.0}, "wan": {"guidance_scale": 1.0},
    "wan_5b": {"guidance_scale": 1.0}, "z_image": {"guidance_scale": 0.0}, "qwen_image": {"true_cfg_scale": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_GUIDANCE)
def test_a_student_of_any_family_has_its_length_and_no_guidance(name: str) -> None:
    pipe, baked = tiny.MAKERS[name](), NO_GUIDANCE[name]
    family = family_of(pipe)
    size = replace(tiny.SIZE, frames=1) if name.startswith("wan") else tiny.SIZE
    student = replace(tiny.manifest(family, (2,), family.geometry(64, 32), size), max_tokens=33)
    assert student.baked == baked and family_of_student(pipe, student).max_tokens == 33
    (argument, value), *_ = baked.items()
    with pytest.raises(
        BundleError, match=rf"^baked.{argument} is 3.5: accepted for the family .* is {value:g}, no guid"
    ):
        family_of_student(pipe, replace(student, baked={argument: 3.5}))
    other = {"another_scale": 2.0}
    with pytest.raises(BundleError, match="^baked.another_scale is 2.0: accepted for the family .* is 1, no guidance$"):
        family_of_student(pipe, replace(student, baked=other))
    assert family_of_student(pipe, replace(student, baked={})).max_tokens == 33


def test_flux_reads_its_guidance_only_where_it_is_distilled() -> None:
    dev, schnell = tiny.flux(guidance_embeds=True), tiny.flux()
    student = student_of(dev, max_tokens=17, baked={"guidance_scale": 2.5})
    for pipe, guidance, baked in ((dev, 2.5, {"guidance_scale": 2.5}), (schnell, None, {})):
        family: Any = family_of_student(pipe, student)
        assert (family.guidance, family.baked, family.max_tokens) == (guidance, baked, 17)
    default: Any = family_of_student(dev, replace(student, baked={}))
    assert default.guidance == 3.5


def condition(rows: int, pooled: bool = True) -> Condition:
    tokens = torch.arange(rows * 6, dtype=torch.float32).reshape(rows, 2, 3)
    return Condition(tokens, tokens[:, 0] + 100 if pooled else None)


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_of_a_condition_keep_both_of_their_parts_in_order(pooled: bool) -> None:
    whole = condition(4, pooled)
    for index, rows in ((2, [2]), ([3, 1], [3, 1]), (slice(1, 3), [1, 2]), (-1, [3])):
        found = whole.take(index)  # type: ignore[arg-type]
        assert torch.equal(found.tokens_BLE, whole.tokens_BLE[rows]) and len(found) == len(rows)
        assert (found.pooled_BP is None) is not pooled
        if found.pooled_BP is not None and whole.pooled_BP is not None:
            assert torch.equal(found.pooled_BP, whole.pooled_BP[rows])
    stacked = Condition.stack([whole.take([3, 0]), whole.take(1)])
    assert torch.equal(stacked.tokens_BLE, whole.tokens_BLE[[3, 0, 1]])
    assert (
        (stacked.pooled_BP is None)
        if whole.pooled_BP is None
        else torch.equal(stacked.pooled_BP, whole.pooled_BP[[3, 0, 1]])
    )  # type: ignore[arg-type]
    narrow = whole.to("cpu", torch.float16)
    assert {part.dtype for part in (narrow.tokens_BLE, narrow.pooled_BP) if part is not None} == {torch.float16}


def test_remembered_prompts_need_no_encoder_and_others_do() -> None:
    family = family_of(tiny.sd3(with_t5=False, dual=False), max_tokens=tiny.MAX_TOKENS)
    first, second = (family.encode([prompt]) for prompt in ("a", "b"))
    family.remember({"a": first, "b": second})
    found = family.encode(["b", "a", "b"])
    assert torch.equal(found.tokens_BLE, torch.cat([second.tokens_BLE, first.tokens_BLE, second.tokens_BLE]))
    assert family.text_encoder is None and family.text_encoder_2 is None
    for prompts in (["a", "c"], []):
        with pytest.raises(RuntimeError, match="^the text encoders were dropped: encode all prompts before$"):
            family.encode(prompts)


@pytest.mark.parametrize(
    ("side", "multiple", "most", "good"),
    [
        (48, 16, 48, True),
        (64, 16, 48, False),
        (8, 16, None, False),
        (16, 16, None, True),
        (24, 16, None, False),
        (0, 1, None, False),
    ],
)
@pytest.mark.parametrize("which", ["height", "width"])
def test_a_side_is_a_multiple_up_to_the_most(
    side: int, multiple: int, most: int | None, good: bool, which: str
) -> None:
    size = (side, multiple) if which == "height" else (multiple, side)
    if good:
        check_size(*size, multiple, most)
        return
    limit = f" up to {most}" if most else ""
    with pytest.raises(SizeError, match=f"^{which} is {side}: accepted are multiples of {multiple}{limit}$"):
        check_size(*size, multiple, most)


class Halves(nn.Module):
    """Two answers in a narrow type, of inputs in order."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert torch.is_inference_mode_enabled() and a.is_contiguous()
        return (a - b).to(torch.bfloat16), (a + b).to(torch.bfloat16)


def test_a_stage_in_torch_answers_by_name_in_float32() -> None:
    stage = TorchStage(Halves(), ("difference", "sum"), "cpu")
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3).T, np.ones((3, 2), np.float32)
    found = stage.run(["sum", "difference"], {"first": a, "second": b})
    np.testing.assert_array_equal(found[0], a + 1)
    np.testing.assert_array_equal(found[1], a - 1)
    assert [array.dtype for array in found] == [np.float32] * 2
    (one,) = TorchStage(nn.Identity(), ("y",), "cpu").run(["y"], {"x": b})
    np.testing.assert_array_equal(one, b)
    too_few: Callable[[], Any] = lambda: TorchStage(Halves(), ("difference",), "cpu").run([], {"a": a, "b": b})  # noqa: E731
    with pytest.raises(ValueError, match="longer"):
        too_few()
