"""ImageReward and the aesthetic predictor: their published layouts, made on the spot, against the authors' forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from rewards.aesthetic import aesthetic
from rewards.imagereward import Architecture, imagereward, split
from rewards.imagereward import published as full_size
from rewards.interface import RewardError
from rewards.preprocess import Preprocess
from tests.rewards import published

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "star", "heart", "above"]


def tiny() -> Architecture:
    text = BlipTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        encoder_hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=2,
        sep_token_id=3,
    )
    vision = BlipVisionConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=published.SIDE,
        patch_size=7,
        layer_norm_eps=1e-6,
    )
    return Architecture(text, vision)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "ImageReward").mkdir()
    return tmp_path


def images() -> Tensor:
    return torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(4))


def test_imagereward_is_the_packages_forward(files: Path) -> None:
    reference = published.Blip(len(WORDS)).eval()
    torch.save(reference.state_dict(), files / "ImageReward" / "ImageReward.pt")
    tokenizer = BertTokenizer.from_pretrained(files / "bert-base-uncased")
    batch = tokenizer(published.PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert batch.input_ids[0].tolist()[:9] == [2, 5, 6, 9, 10, 5, 7, 8, 3]  # by hand, from WORDS
    with torch.no_grad():
        pixels = Preprocess(published.SIDE)(images())
        expected = reference.score(pixels, batch.input_ids, batch.attention_mask)
    score = imagereward(files, tiny()).score(images(), published.PROMPTS)
    assert (expected[0] - expected[1]).abs() > 1e-2
    assert (score - expected).abs().max() < 1e-4 * float(expected.abs().max())


def test_imagereward_reads_the_prompt_and_gives_the_pixels_a_gradient(files: Path) -> None:
    torch.save(published.Blip(len(WORDS)).state_dict(), files / "ImageReward" / "ImageReward.pt")
    reward = imagereward(files, tiny())
    pixels = images().requires_grad_()
    score = reward.score(pixels, published.PROMPTS)
    score.sum().backward()
    assert pixels.grad is not None and (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    swapped = reward.score(images(), published.PROMPTS[::-1])
    assert (score.detach() - swapped).abs().min() > 1e-3


def test_another_imagereward_checkpoint_is_refused_by_name() -> None:
    state = published.Blip(len(WORDS)).state_dict()
    for name in ("blip.momentum", "blip.visual_encoder.blocks.0.attn.bias", "blip.visual_encoder.norm3.weight"):
        with pytest.raises(RewardError, match=f"x.pt: {name} is unknown"):
            split({**state, name: torch.zeros(1)}, "x.pt")


def test_the_full_size_model_has_the_published_shapes() -> None:
    """med_config.json and create_vit('large') of the package: the numbers that no checkpoint of a tiny model tells."""
    text, vision = full_size().text, full_size().vision
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (30524, 768, 3072)
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (12, 12, 512)
    assert (text.encoder_hidden_size, text.layer_norm_eps, text.hidden_act) == (1024, 1e-12, "gelu")
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.patch_size, vision.image_size) == (16, 16, 224)
    assert (vision.layer_norm_eps, vision.hidden_act) == (1e-6, "gelu")


def test_the_aesthetic_predictor_is_its_head_on_the_unit_image_vector(tmp_path: Path) -> None:
    clip = published.write_clip(tmp_path / "clip-vit-large-patch14", published.clip_config("quick_gelu"))
    head = published.Mlp(16).eval()
    published.randomise(head, 9)
    (tmp_path / "improved-aesthetic-predictor").mkdir()
    torch.save(head.state_dict(), tmp_path / "improved-aesthetic-predictor" / "sac+logos+ava1-l14-linearMSE.pth")
    with torch.no_grad():
        vector = clip.get_image_features(pixel_values=Preprocess(published.SIDE)(images())).pooler_output
        expected = head(vector / vector.norm(dim=-1, keepdim=True))[:, 0]
    reward = aesthetic(tmp_path)
    assert (reward.score(images(), published.PROMPTS) - expected).abs().max() < 1e-5
    assert (expected[0] - expected[1]).abs() > 1e-3
    pixels = images().requires_grad_()
    reward.score(pixels, published.PROMPTS).sum().backward()
    assert pixels.grad is not None and (pixels.grad.flatten(1).abs().amax(1) > 0).all()
