"""PickScore and CLIP score against the authors' own way to call the model, on tiny models of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from rewards.clip import ClipReward, clip_score, pickscore
from tests.rewards import published

SIDE = published.SIDE


def byte_images(side: int = SIDE) -> Tensor:
    """Two images whose values are whole bytes, so that a trip through PIL changes nothing."""
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1)) / 255


def as_published(model: CLIPModel, folder: Path, images: Tensor) -> Tensor:
    """PickScore's README, with the model's temperature."""
    pils = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    return published.pick_score(model, CLIPTokenizer.from_pretrained(folder), pils, published.PROMPTS)


# 2 is what PickScore's config.json says: transformers then pools at the highest id.
@pytest.mark.parametrize("eos_token_id", [None, 2])
def test_pickscore_is_the_published_call(tmp_path: Path, eos_token_id: int | None) -> None:
    model = published.write_clip(tmp_path / "PickScore_v1", published.clip_config(eos_token_id=eos_token_id))
    words = tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    published.write_vocabulary(words)
    images = byte_images()
    expected = as_published(model, words, images)
    assert abs(float(model.logit_scale.exp()) - 1) > 0.1
    assert (pickscore(tmp_path).score(images, published.PROMPTS) - expected).abs().max() < 1e-5
    large = byte_images(61)
    expected = as_published(model, words, large)
    assert (pickscore(tmp_path).score(large, published.PROMPTS) - expected).abs().max() < 0.02  # PIL rounds to bytes


def test_clip_score_is_the_plain_cosine_of_openais_model(tmp_path: Path) -> None:
    model = published.write_clip(tmp_path / "clip-vit-large-patch14", published.clip_config("quick_gelu"))
    published.write_vocabulary(tmp_path / "clip-vit-large-patch14")
    images = byte_images()
    expected = as_published(model, tmp_path / "clip-vit-large-patch14", images) / float(model.logit_scale.exp())
    assert (clip_score(tmp_path).score(images, published.PROMPTS) - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> ClipReward:
    files = tmp_path_factory.mktemp("files")
    published.write_clip(files / "clip-vit-large-patch14", published.clip_config())
    published.write_vocabulary(files / "clip-vit-large-patch14")
    return clip_score(files)


def test_words_become_the_ids_that_byte_pair_encoding_gives(reward: ClipReward) -> None:
    prompts = [*published.PROMPTS, "12 red hearts in 2026"]
    assert reward.words.tokenizer(prompts).input_ids == [published.encode(prompt) for prompt in prompts]


def test_a_prompt_too_long_keeps_its_end_token_and_what_is_cut_does_not_count(reward: ClipReward) -> None:
    long = " ".join(["blue", "red", "on"] * 30)
    assert reward.words is not None
    cut = reward.embed_texts(*reward.words.read([long, long + " heart"]))
    assert torch.equal(cut[0], cut[1])
    assert torch.isfinite(cut).all()


def test_an_images_score_does_not_depend_on_its_batch(reward: ClipReward) -> None:
    images = byte_images()
    both = reward.score(images, published.PROMPTS)
    alone = [reward.score(images[i : i + 1], published.PROMPTS[i : i + 1]) for i in range(2)]
    assert (both - torch.cat(alone)).abs().max() < 1e-6


def test_the_gradient_reaches_the_pixels_and_no_weight(reward: ClipReward) -> None:
    images = byte_images(40).requires_grad_()
    reward.train()
    reward.score(images, published.PROMPTS).sum().backward()
    assert (
        images.grad is not None
        and torch.isfinite(images.grad).all()
        and (images.grad.flatten(1).abs().amax(1) > 0).all()
    )
    assert not any(weight.requires_grad for weight in reward.parameters())
    assert not reward.training


def test_in_bf16_the_scores_stay_fp32_and_close(reward: ClipReward) -> None:
    images = byte_images()
    full = reward.score(images, published.PROMPTS)
    half = reward.to(torch.bfloat16).score(images.bfloat16(), published.PROMPTS)
    reward.float()
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.05
