"""HPS v2.1: an open_clip checkpoint, made on the spot, against open_clip's own mathematics."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.hps import from_open_clip, hps, vit_h_14
from rewards.interface import RewardError
from rewards.preprocess import Preprocess
from tests.rewards import published

NAME = "HPS_v2.1_compressed"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    published.write_vocabulary(tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    (tmp_path / "HPSv2").mkdir()
    return tmp_path


def images() -> Tensor:
    return torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(2))


def test_hps_is_open_clips_forward(files: Path) -> None:
    reference = published.OpenClip().eval()
    torch.save({"state_dict": reference.state_dict(), "epoch": 3}, files / "HPSv2" / f"{NAME}.pt")
    with torch.no_grad():
        expected = reference.score(Preprocess(published.SIDE, "pad")(images()), published.PROMPTS)
    score = hps(files, published.clip_config()).score(images(), published.PROMPTS)
    assert (score - expected).abs().max() < 1e-5
    assert (expected[0] - expected[1]).abs() > 1e-2
    torch.save({"state_dict": reference.half().state_dict()}, files / "HPSv2" / f"{NAME}.pt")
    halved = hps(files, published.clip_config())
    assert halved.dtype == torch.float32
    assert (halved.score(images(), published.PROMPTS) - expected).abs().max() < 1e-2


def test_the_pickle_is_read_once_and_kept_as_safetensors(files: Path) -> None:
    original, kept = (files / "HPSv2" / f"{NAME}{suffix}" for suffix in (".pt", ".safetensors"))
    torch.save({"state_dict": published.OpenClip().state_dict()}, original)
    first = hps(files, published.clip_config()).score(images(), published.PROMPTS)
    assert [path.name for path in (files / "HPSv2").iterdir() if path != original] == [kept.name]
    original.unlink()
    assert torch.equal(hps(files, published.clip_config()).score(images(), published.PROMPTS), first)


def test_a_pickle_that_changed_is_read_again(files: Path) -> None:
    original = files / "HPSv2" / f"{NAME}.pt"
    model = published.OpenClip()
    torch.save({"state_dict": model.state_dict()}, original)
    first = hps(files, published.clip_config()).score(images(), published.PROMPTS)
    published.randomise(model, 11)
    torch.save({"state_dict": model.state_dict()}, original)
    assert not torch.equal(hps(files, published.clip_config()).score(images(), published.PROMPTS), first)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("visual.proj"), "visual_projection.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda state: state.update({"visual.ln_mid.weight": torch.zeros(1)}), "visual.ln_mid.weight is unknown"),
        (lambda state: state.update({"ln_final.bias": torch.zeros(3)}), r"has shape \(3,\), not \(32,\)"),
    ],
)
def test_another_checkpoint_is_refused_by_name(files: Path, change: object, sentence: str) -> None:
    state = published.OpenClip().state_dict()
    change(state)  # type: ignore[operator]
    torch.save({"state_dict": state}, files / "HPSv2" / f"{NAME}.pt")
    with pytest.raises(RewardError, match=sentence):
        hps(files, published.clip_config())


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_would_run_code_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    torch.save({"state_dict": Evil()}, files / "HPSv2" / f"{NAME}.pt", pickle_module=pickle)
    with pytest.raises(RewardError, match="is incomplete or not a checkpoint of plain tensors"):
        hps(files, published.clip_config())
    assert not (files / "ran").exists()


def test_a_torn_file_and_one_without_state_dict_are_refused(files: Path) -> None:
    path = files / "HPSv2" / f"{NAME}.pt"
    torch.save({"state_dict": published.OpenClip().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RewardError, match="is incomplete or not a checkpoint .*: download it again"):
        hps(files, published.clip_config())
    torch.save({"model": {}}, path)
    with pytest.raises(RewardError, match="holds no 'state_dict'"):
        hps(files, published.clip_config())


def test_every_name_of_the_full_size_model_is_mapped() -> None:
    """The real ViT-H/14, without its memory: names and shapes after the mapping are those of transformers' model."""
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = {name: value.shape for name, value in CLIPModel(vit_h_14()).state_dict().items()}
    text, vision = vit_h_14().text_config, vit_h_14().vision_config
    # What no shape tells: open_clip's head widths of 64 and 80, and its exact GELU.
    assert (text.hidden_size // text.num_attention_heads, vision.hidden_size // vision.num_attention_heads) == (64, 80)
    assert (text.hidden_act, vision.hidden_act, text.eos_token_id) == ("gelu", "gelu", 49407)
    published_shapes = _vit_h_14_shapes()
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in published_shapes.items()}
    mapped = from_open_clip(state, NAME)
    assert {name: value.shape for name, value in mapped.items()} == expected
    assert (
        sum(value.numel() for value in mapped.values()) == 986_109_441
    )  # open_clip's docs/model_profile.csv: 986.11 M


def _vit_h_14_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    norms = {"ln_final": 1024, "visual.ln_pre": 1280, "visual.ln_post": 1280}
    for prefix, layers, width in (("", 24, 1024), ("visual.", 32, 1280)):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            linear = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
            for name, (out, inner) in linear.items():
                shapes[f"{block}.{name}weight"] = (out * width, inner * width)
                shapes[f"{block}.{name}bias"] = (out * width,)
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
