"""FLUX.1 in a single file as black-forest-labs publish it: diffusers reads it, and what is drawn is its pipeline's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as reader
from safetensors.torch import save_file
from torch import Tensor, nn

from student.pipeline import open_pipeline
from student.runtimes.load import load
from tests.export.adopting import PROMPTS, own_picture, published, run
from tests.student.families import tiny

# diffusers' names -> those of FLUX's authors
WHOLE = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
TOGETHER = {
    "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn", "to_q", "to_k", "to_v"),
    "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
    "single_blocks.0.linear1": ("single_transformer_blocks.0", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def in_their_names(transformer: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of one block of each kind, as FLUX's authors save it."""
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    names = dict(WHOLE)
    names |= {f"transformer_blocks.0.{key}": f"double_blocks.0.{name}" for key, name in DOUBLE.items()}
    names |= {f"single_transformer_blocks.0.{key}": f"single_blocks.0.{name}" for key, name in SINGLE.items()}
    found = {}
    for together, (block, *parts) in TOGETHER.items():
        for kind in ("weight", "bias"):
            found[f"{together}.{kind}"] = torch.cat([state.pop(f"{block}.{part}.{kind}") for part in parts])
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        halves = value.chunk(2)[::-1] if layer == "norm_out.linear" else (value,)  # shift before scale
        name = f"{names[layer]}.{'scale' if 'norm.' in names[layer] else kind}"
        found[name] = torch.cat(halves).contiguous()
    return found


@pytest.fixture
def of_tiny_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' reader has FLUX's width as a constant of its code; all else is as it is."""
    code: Any = reader.__code__
    assert 3072 in code.co_consts
    width = tuple(32 if constant == 3072 else constant for constant in code.co_consts)
    monkeypatch.setattr(reader, "__code__", code.replace(co_consts=width))


@pytest.mark.usefixtures("of_tiny_width")
@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_the_authors_file_is_drawn_as_the_diffusers_pipeline_draws_it(tmp_path: Path, guided: bool) -> None:
    base = published(tmp_path / "flux", tiny.flux(guidance_embeds=guided, seed=1))
    for weights in base.glob("transformer/*.safetensors"):
        weights.unlink()
    tuned, file, out = tiny.flux(guidance_embeds=guided, seed=2), tmp_path / "tuned.safetensors", tmp_path / "student"
    save_file(in_their_names(tuned.transformer), file)
    code, said = run(file, "--config", base, "--steps", "2", "--size", "32x64", "--out", out)
    assert code == 0 and "read tuned.safetensors as flux's transformer" in said, said
    opened = open_pipeline(out).transformer.state_dict()
    assert opened.keys() == tuned.transformer.state_dict().keys()
    for key, value in tuned.transformer.state_dict().items():
        assert torch.equal(opened[key], value), key
    expected = tiny.flux(guidance_embeds=guided, seed=1)
    expected.transformer = tuned.transformer
    call = {"guidance_scale": 3.5} if guided else {"max_sequence_length": 256}
    theirs = own_picture(published(tmp_path / "whole", expected), 2, PROMPTS[0], 7, **call)
    np.testing.assert_allclose(load(out, "torch").draw([PROMPTS[0]], [7], 2), theirs, atol=1e-4)


@pytest.mark.usefixtures("of_tiny_width")
@pytest.mark.parametrize(
    ("of_file", "sentence"),
    [(True, "it takes a guidance scale, and flux does not"), (False, "it lacks some of its weights")],
)
def test_a_file_of_dev_is_not_read_as_schnell_nor_the_other_way_round(
    tmp_path: Path, of_file: bool, sentence: str
) -> None:
    base, file = published(tmp_path / "flux", tiny.flux(guidance_embeds=not of_file)), tmp_path / "tuned.safetensors"
    save_file(in_their_names(tiny.flux(guidance_embeds=of_file).transformer), file)
    code, said = run(file, "--config", base, "--steps", "2", "--size", "32x64", "--out", tmp_path / "out")
    assert code == 1 and f"is not a checkpoint of flux's FluxTransformer2DModel: {sentence}" in said, said
    assert not (tmp_path / "out").exists()
