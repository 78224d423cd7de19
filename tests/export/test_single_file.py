"""Checkpoints in a single file, in their authors' names and in diffusers', with the rest from a pipeline's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export import adoption
from student.bundle import read_student
from student.files import verify_files
from student.pipeline import open_pipeline
from student.runtimes.load import load
from tests.export.adopting import PROMPTS, own_picture, published, run
from tests.student.families import tiny

CALL = {"guidance_scale": 1.0}
# diffusers' names -> those of Stable Diffusion 3's authors
WHOLE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
TOGETHER = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def in_their_names(transformer: nn.Module) -> dict[str, Tensor]:
    """A checkpoint as Stable Diffusion 3's authors save it, an autoencoder beside the transformer."""
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    swapped = ("norm_out.linear", f"transformer_blocks.{blocks - 1}.norm1_context.linear")  # shift before scale
    names = dict(WHOLE)
    for b in range(blocks):
        names |= {f"transformer_blocks.{b}.{key}": f"joint_blocks.{b}.{name}" for key, name in BLOCK.items()}
    found = {"pos_embed": state.pop("pos_embed.pos_embed")}
    for b, (together, parts) in ((b, pair) for b in range(blocks) for pair in TOGETHER.items()):
        for kind in ("weight", "bias"):
            keys = [f"transformer_blocks.{b}.{part}.{kind}" for part in parts]
            if keys[0] in state:
                found[f"joint_blocks.{b}.{together}.{kind}"] = torch.cat([state.pop(key) for key in keys])
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        halves = value.chunk(2) if layer in swapped else (value,)
        found[f"{names[layer]}.{kind}"] = torch.cat(halves[::-1])
    whole = {f"model.diffusion_model.{key}": value.contiguous() for key, value in found.items()}
    return {**whole, "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4)}


def plain(transformer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in transformer.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 of other weights, without its transformer's: only what a file lacks is taken of it."""
    folder = published(tmp_path_factory.mktemp("base") / "sd3", tiny.sd3(seed=1))
    for path in folder.glob("transformer/*.safetensors"):
        path.unlink()
    return folder


@pytest.mark.parametrize("names", [in_their_names, plain])
def test_a_file_is_the_transformer_and_the_rest_is_the_pipelines(
    base: Path, tmp_path: Path, names: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    tuned, out, file = tiny.sd3(seed=2), tmp_path / "student", tmp_path / "tuned.safetensors"
    save_file(names(tuned.transformer), file)
    code, said = run(file, "--config", base, "--steps", "2", "--size", "32x64", "--out", out)
    assert code == 0 and "read tuned.safetensors as sd3's transformer" in said, said
    verify_files(out, student := read_student(out))
    assert student.teacher == "tuned.safetensors" and (out / "README.md").read_text().count("base_model: sd3\n") == 1
    opened, expected = open_pipeline(out), tiny.sd3(seed=1)
    expected.transformer = tuned.transformer
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        ours = getattr(opened, part).state_dict()
        for key, value in getattr(expected, part).state_dict().items():
            assert torch.equal(ours[key], value), f"{part}.{key}"
    theirs = own_picture(published(tmp_path / "whole", expected), 2, PROMPTS[0], 7, **CALL)
    np.testing.assert_allclose(load(out, "torch").draw([PROMPTS[0]], [7], 2), theirs, atol=1e-4)
    assert "already exists" in run(file, "--config", base, "--steps", "2", "--size", "32x64", "--out", out)[1]


def _torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _lacks(file: Path) -> None:
    state = load_file(file)
    del state["proj_out.bias"]
    save_file(state, file)


def _lacks_theirs(file: Path) -> None:
    state = in_their_names(tiny.sd3().transformer)
    del state["model.diffusion_model.final_layer.linear.bias"]
    save_file(state, file)


def _without_norms(file: Path) -> None:
    """diffusers' reader takes it for an older model, and fills nothing in."""
    state = in_their_names(tiny.sd3().transformer)
    save_file({key: value for key, value in state.items() if ".ln_" not in key}, file)


def _narrower(file: Path) -> None:
    save_file({**load_file(file), "proj_out.weight": torch.zeros(3, 3)}, file)


def _another(file: Path) -> None:
    save_file(plain(tiny.flux().transformer), file)


def _nobodys(file: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2)}, file)


def _float8(file: Path) -> None:
    save_file({**load_file(file), "proj_out.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}, file)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_torn, "is incomplete: its last 100 bytes are missing"),
        (_lacks, "tuned.safetensors is not a checkpoint of sd3's SD3Transformer2DModel: it lacks proj_out.bias"),
        (_narrower, "sd3's SD3Transformer2DModel: Cannot load because proj_out.weight expected shape"),
        (_another, "sd3's SD3Transformer2DModel: it lacks pos_embed.pos_embed"),
        (_nobodys, "sd3's SD3Transformer2DModel: it has neither diffusers' names of its weights nor its authors'"),
        (_lacks_theirs, "sd3's SD3Transformer2DModel: it lacks final_layer.linear.bias"),
        (_without_norms, "sd3's SD3Transformer2DModel: it lacks some of its weights"),
        (_float8, "has its weights as F8_E4M3: accepted are BF16, F16 and F32"),
        (
            lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            "is a Git LFS pointer, not the file itself: run git lfs pull",
        ),
    ],
)
def test_another_file_is_refused_in_one_sentence_with_nothing_written(
    base: Path, tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    file = tmp_path / "tuned.safetensors"
    save_file(plain(tiny.sd3().transformer), file)
    spoil(file)
    code, said = run(file, "--config", base, "--size", "32x64", "--out", tmp_path / "out")
    assert code == 1 and sentence in said and said.startswith("adopt: ") and "Traceback" not in said, said
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_that_says_too_little_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, pickled = tmp_path / "tuned.safetensors", tmp_path / "tuned.ckpt"
    save_file(plain(tiny.sd3().transformer), file)
    shutil.copy(file, pickled)
    out = ("--size", "32x64", "--out", tmp_path / "out")
    assert "add --config with the folder or hub id of the pipeline" in run(file, *out)[1]
    assert "is a .ckpt file: accepted is .safetensors" in run(pickled, "--config", base, *out)[1]
    two = published(tmp_path / "wan", tiny.wan_14b())
    assert "wan has two transformers, but a single file has only one" in run(file, "--config", two, *out)[1]
    monkeypatch.setattr(adoption, "free_bytes", lambda: 1000)
    assert "converting tuned.safetensors needs" in run(file, "--config", base, *out)[1]
    assert not (tmp_path / "out").exists()
