"""HPSv3 on a tiny model of the real class, whose weights lie as published, against transformers' own pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from rewards.hpsv3 import INSTRUCTION, PIXELS, HpsV3, hpsv3, patches
from rewards.interface import RewardError
from rewards.registry import find
from tests.rewards import published

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
NAME = "HPSv3.safetensors"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:], model_max_length=32768
    )


def config(words: int) -> Qwen2VLConfig:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": words, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=261)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2VLForConditionalGeneration, nn.Sequential]:
    """The files in their folders, the model that they are of, and its head."""
    files = tmp_path_factory.mktemp("files")
    words = tokenizer()
    words.save_pretrained(files / "Qwen2-VL-7B-Instruct")
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(config(len(words) + 1)).eval()
    published.randomise(model, 5)
    assert words.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    config(len(words) + 100).save_pretrained(files / "Qwen2-VL-7B-Instruct")  # the base has more rows than words
    head = nn.Sequential(
        nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    ).eval()
    with torch.no_grad():
        head[-1].weight.mul_(20)
    (files / "HPSv3").mkdir()
    save_file(as_published(model, head), files / "HPSv3" / NAME)
    return files, model, head


def as_published(model: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    """By the names of transformers 4.45."""
    state = {}
    for name, value in model.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[old] = value.clone()
    return state | {f"rm_head.{name}": value.clone() for name, value in head.state_dict().items()}


def reference(
    model: Qwen2VLForConditionalGeneration, head: nn.Module, images: Tensor, prompts: Sequence[str], far: bool = True
) -> Tensor:
    """Picture by picture, by transformers' own processor and model, with positions that count every token."""
    words = tokenizer()
    words.add_tokens(["<|Reward|>"], special_tokens=True)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        as_bytes = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        seen = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)([as_bytes], return_tensors="pt")
        places = int(seen["image_grid_thw"].prod()) // 4
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * places
            + "<|vision_end|>"
            + INSTRUCTION.format(prompt=prompt)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = torch.tensor([words(text).input_ids])
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1).clone()
        if not far:  # as today's Qwen2-VL counts a picture's rows and columns: of less than its tokens
            positions -= (positions > positions.shape[-1] // 4) * places // 2
        out = model.model(
            input_ids=ids,
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            position_ids=positions,
        )
        [at] = (ids[0] == words.convert_tokens_to_ids("<|Reward|>")).nonzero().flatten().tolist()
        found.append(head(out.last_hidden_state[0, at])[0])
    return torch.stack(found)


@torch.no_grad()
def test_a_score_is_that_of_transformers_own_processor_and_model(
    made: tuple[Path, Qwen2VLForConditionalGeneration, nn.Sequential],
) -> None:
    files, model, head = made
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(2)).mul(255).round() / 255
    prompts = ["a red heart", "a blue star above a much longer sentence, so that the first one is padded"]
    expected = reference(model, head, images, prompts)
    found = find("hpsv3", files=files).score(images, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    others = [reference(model, head, images.flip(0), prompts), reference(model, head, images, prompts[::-1])]
    others.append(reference(model, head, images, prompts, far=False))
    assert all((other - expected).abs().min() > 0.02 for other in others), others


def test_patches_are_the_processors_own() -> None:
    images = torch.rand(2, 3, 70, 130, generator=torch.Generator().manual_seed(4)).mul(255).round() / 255
    as_bytes = [(one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for one in images]
    theirs = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)(as_bytes, return_tensors="pt")
    found, rows, columns = patches(images, 14, 2)
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]] * 2
    # it rounds to bytes, which has no gradient
    assert (found.flatten(0, 1) - theirs["pixel_values"]).abs().max() < 1.5 / 255 / 0.26


def test_it_has_a_gradient_and_its_head_stays_in_fp32(
    made: tuple[Path, Qwen2VLForConditionalGeneration, nn.Sequential],
) -> None:
    files, _, head = made
    reward = find("hpsv3", files=files, dtype=torch.bfloat16)
    assert isinstance(reward, HpsV3) and reward.dtype == torch.bfloat16
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in reward.head.state_dict().items())
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    score = reward.score(images, ["a red heart"])
    score.sum().backward()
    assert score.dtype == torch.float32 and images.grad is not None and images.grad.abs().sum() > 0


def test_what_a_prompt_says_in_special_tokens_is_left_out(
    made: tuple[Path, Qwen2VLForConditionalGeneration, nn.Sequential],
) -> None:
    reward = hpsv3(made[0])
    odd, plain = (reward.read([text], 3)[0] for text in ("a <|Reward|>red<|image_pad|> {heart}", "a red {heart}"))
    assert torch.equal(odd, plain) and int((odd == reward.reward).sum()) == 1 and int((odd == reward.place).sum()) == 3
    words = reward.read(["a red heart"], 3)[0]
    for special in reward.tokenizer.get_added_vocab():
        assert torch.equal(reward.read([f"a {special}red heart"], 3)[0], words), special


def test_another_checkpoint_is_refused_by_name(
    made: tuple[Path, Qwen2VLForConditionalGeneration, nn.Sequential], tmp_path: Path
) -> None:
    (tmp_path / "Qwen2-VL-7B-Instruct").symlink_to(made[0] / "Qwen2-VL-7B-Instruct")
    (tmp_path / "HPSv3").mkdir()
    state = load_file(made[0] / "HPSv3" / NAME)
    for change, sentence in (
        ({"odd": torch.zeros(1)}, "odd is unknown"),
        ({"rm_head.6.weight": torch.zeros(1)}, "6.weight is unknown"),
        ({"model.norm.weight": torch.zeros(3)}, r"language_model.norm.weight has shape \(3,\)"),
    ):
        save_file({**state, **change}, tmp_path / "HPSv3" / NAME)
        with pytest.raises(RewardError, match=sentence):
            hpsv3(tmp_path)
