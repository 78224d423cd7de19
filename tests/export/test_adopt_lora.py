"""LoRAs of each style are merged into what is adopted: W + weight * B A, by hand and as the pipeline itself does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from student.runtimes.load import load
from tests.export.adopting import MODELS, PROMPTS, a_lora, own_picture, run, schnell
from tests.student.families import tiny


def _by_hand(pipe: Any, state: dict[str, torch.Tensor], weight: float) -> None:
    """W + weight * B A."""
    for key in [key for key in state if ".lora_A." in key]:
        layer = pipe.transformer.get_submodule(key.removeprefix("transformer.").partition(".lora_A")[0])
        with torch.no_grad():
            layer.weight += weight * state[key.replace("lora_A", "lora_B")] @ state[key]


@pytest.mark.parametrize("name", ["schnell", "turbo"])
def test_a_lora_is_merged(sources: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    pipe = MODELS[name]()
    state = a_lora(MODELS[name]())
    save_file(state, tmp_path / "turbo.safetensors")
    _by_hand(pipe, state, 0.5)
    out = tmp_path / "merged"
    code, said = run(sources(name), "--size", "32x64", "--lora", f"{tmp_path / 'turbo.safetensors'}:0.5", "--out", out)
    assert code == 0 and "merged turbo.safetensors with weight 0.5 into" in said
    merged = load_file(next(out.glob("transformer/*.safetensors")))
    for key, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(merged[key], value, atol=1e-6, rtol=1e-5)
    assert "Merged into it: turbo.safetensors, weight 0.5." in (out / "README.md").read_text()


RANK, ALPHA, WEIGHT = 2, 1.0, 0.5


def kohya_style(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """kohya's names and its alpha: alpha / rank * up down; one factor for q, k and v together."""
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    return {**factors, f"{layer}.alpha": torch.tensor(ALPHA)}


def diffusers_style(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """diffusers' names, and no alpha: B A, a layer for each of q, k and v."""
    state = {}
    for letter, part in zip("qkv", up.chunk(3), strict=True):
        layer = f"transformer.transformer_blocks.0.attn.to_{letter}"
        state |= {f"{layer}.lora_A.weight": down.clone(), f"{layer}.lora_B.weight": ALPHA / RANK * part.contiguous()}
    return state


@pytest.mark.parametrize("style", [kohya_style, diffusers_style])
def test_one_change_in_either_style_is_merged_as_the_pipeline_merges_it(
    sources: Callable[[str], Path], tmp_path: Path, style: Callable[..., dict[str, torch.Tensor]]
) -> None:
    transformer, gen = schnell().transformer, torch.Generator().manual_seed(4)
    width = transformer.transformer_blocks[0].attn.to_q.weight.shape[0]
    up, down = torch.randn(3 * width, RANK, generator=gen) * 0.3, torch.randn(RANK, width, generator=gen)
    file, out = tmp_path / "lora.safetensors", tmp_path / "merged"
    save_file(style(up, down), file)
    code, said = run(sources("schnell"), "--size", "32x64", "--lora", f"{file}:{WEIGHT}", "--out", out)
    assert code == 0, said
    merged = load_file(next(out.glob("transformer/*.safetensors")))
    for letter, part in zip("qkv", up.chunk(3), strict=True):
        key = f"transformer_blocks.0.attn.to_{letter}.weight"
        expected = transformer.state_dict()[key] + WEIGHT * ALPHA / RANK * part @ down
        torch.testing.assert_close(merged[key], expected, atol=1e-5, rtol=1e-4)

    def fused(pipe: Any) -> None:
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipe.fuse_lora(lora_scale=WEIGHT)

    call = {"max_sequence_length": 256}
    theirs = own_picture(sources("schnell"), 4, PROMPTS[0], 7, fused, **call)
    np.testing.assert_allclose(load(out, "torch").draw([PROMPTS[0]], [7], 4), theirs, atol=1e-4)
    assert np.abs(theirs - own_picture(sources("schnell"), 4, PROMPTS[0], 7, **call)).max() > 0.01


def test_a_lora_of_another_model_and_unknown_keys_are_named(
    sources: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    right = a_lora(schnell())
    kohya = kohya_style(torch.zeros(96, RANK), torch.zeros(RANK, 32))
    key = sorted(right)[0]
    unknown = {key.replace("transformer_blocks.0", "transformer_blocks.9"): value for key, value in right.items()}
    other = {**right, key: torch.zeros(2, 999)}
    counterpart, width = key.replace("lora_A", "lora_B"), right[key].shape[1]
    for state, sentence in (
        (unknown, "transformer_blocks.9.attn.to_q.lora_A.weight, but the model has no layer"),
        (other, f"is for another model: {key} has size 999 where this one has"),
        ({"base.encoder.weight": torch.zeros(2)}, "the LoRA x.safetensors"),
        ({**kohya, "lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)}, "keys detected: lora_unet_nowhere.lora_up"),
        ({**right, key: torch.zeros(3, width)}, f"{key} has rank 3, and {counterpart} has 2"),
        ({name: value for name, value in right.items() if name != counterpart}, f"the key {key}, but no {counterpart}"),
        ({**right, key: torch.full((2, width), math.inf)}, f"the LoRA x.safetensors is broken: {key} has infinite"),
        ({**right, key: torch.full((2, width), math.nan)}, f"the LoRA x.safetensors is broken: {key} has infinite"),
    ):
        save_file(state, tmp_path / "x.safetensors")
        code, said = run(
            sources("schnell"), "--size", "32x64", "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "out"
        )
        assert code == 1 and sentence in said, said
        assert not (tmp_path / "out").exists() and "Loading merged" not in capfd.readouterr().err


def test_a_lora_for_a_model_of_two_experts_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """diffusers would put it into the first expert alone."""
    pipe = tiny.wan_14b()
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    state = {f"transformer.blocks.0.attn1.to_q.lora_{name}.weight": value for name, value in factors.items()}
    save_file(state, tmp_path / "light.safetensors")
    pipe.save_pretrained(tmp_path / "published")
    asked = ("--size", "32x64", "--lora", tmp_path / "light.safetensors", "--out", tmp_path / "out")
    code, said = run(tmp_path / "published", *asked)
    assert code == 1 and "light.safetensors cannot be merged into a model of two experts" in said
    assert not (tmp_path / "out").exists()
