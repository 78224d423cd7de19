"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): a head on Qwen2-VL 7B, which reads the picture and a long instruction.

The released checkpoint holds all weights, in the layout of transformers 4.45, with which it was trained: its text
positions count every token, picture or not. Instruction, picture size and head are those of github.com/MizzenAI/HPSv3
(MIT License, Copyright (c) 2024 HPSv3 Team), hpsv3/dataset/data_collator_qwen.py and hpsv3/config/HPSv3_7B.yaml. The
score is the first of the two numbers (mean, spread) that the head gives at the token for the reward.
Shape suffixes: B batch, C channels, H/W pixels, L tokens, D feature width, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rewards.checkpoint import State, check_names
from rewards.files import Published, locate
from rewards.interface import Network, RewardError, sent
from rewards.preprocess import Preprocess

HPSV3 = Published("MizzenAI/HPSv3", ("HPSv3.safetensors",))
QWEN = Published("Qwen/Qwen2-VL-7B-Instruct", ("config.json", "tokenizer.json", "tokenizer_config.json"))
PIXELS = 256 * 28 * 28
TEMPORAL = 2  # a picture is two equal frames
REWARD, PLACE = "<|Reward|>", "<|image_pad|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{places}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The following "
    "sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any significant "
    "biological or logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail in "
    "textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic and "
    "Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, "
    "depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n- **Contextual Consistency**: Assess whether the background, setting, and "
    "surrounding elements in the image logically fit the scenario described in the prompt. The environment should "
    "support and enhance the subject without contradictions.\n- **Attribute Fidelity**: Check if specific attributes "
    "mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in "
    "the image. Minor deviations may be acceptable, but critical attributes should be preserved.\n- **Semantic "
    "Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The "
    "generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {REWARD}\n\nEND\n"
)
_HEAD, _WORDS = "rm_head.", "language_model.embed_tokens.weight"
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "language_model."), ("model.", "language_model."))


class Head(nn.Sequential):
    """Three layers, in fp32 whatever the rest is moved to."""

    def __init__(self, width: int) -> None:
        gap = nn.Identity  # where the published one has dropout, so that the names of the weights agree
        parts = [nn.Linear(width, 1024), nn.ReLU(), gap(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
        super().__init__(*parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda value: value.to(fn(value).device), recurse)  # type: ignore[no-untyped-call]


class HpsV3(Network):
    """About 0 to 15; it has a gradient; training on it needs a GPU with room for 7 B more weights."""

    def __init__(self, network: Any, head: Head, tokenizer: Any) -> None:
        super().__init__()
        self.network, self.head, self.tokenizer = network, head, tokenizer
        self.place, self.reward = tokenizer.convert_tokens_to_ids([PLACE, REWARD])
        self.freeze()

    def forward(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,)."""
        vision = self.network.config.vision_config
        patches_BPD, rows, columns = patches(images_BCHW, vision.patch_size, vision.spatial_merge_size)
        ids_BL, mask_BL = self.read(prompts, rows * columns // vision.spatial_merge_size**2)
        grid = sent(torch.tensor([[1, rows, columns]] * len(prompts)), self.device)
        seen: Any = self.network.visual(patches_BPD.flatten(0, 1).to(self.dtype), grid_thw=grid)
        words_BLD = self.network.language_model.embed_tokens(ids_BL)
        at_BLD = (ids_BL == self.place)[..., None].expand_as(words_BLD)
        words_BLD = words_BLD.masked_scatter(at_BLD, seen.pooler_output.to(words_BLD.dtype))
        # Positions that are not given count every token, as when it was trained.
        out = self.network.language_model(inputs_embeds=words_BLD, attention_mask=mask_BL, use_cache=False)
        with torch.autocast(self.device.type, enabled=False):
            score_B2: Tensor = self.head(out.last_hidden_state[ids_BL == self.reward].float())
        return score_B2[:, 0]

    def read(self, prompts: Sequence[str], places: int) -> tuple[Tensor, Tensor]:
        """Ids (B, L), and which of them are not padding."""
        texts = [
            CHAT.format(places=PLACE * places, text=INSTRUCTION.format(prompt=self._plain(prompt)))
            for prompt in prompts
        ]
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return sent(batch.input_ids, self.device), sent(batch.attention_mask, self.device)

    def _plain(self, prompt: str) -> str:
        """A prompt without what the tokenizer takes for more than text: there is one picture and one reward."""
        for special in (*map(str, self.tokenizer.get_added_vocab()), REWARD):
            prompt = prompt.replace(special, "")
        return prompt


def patches(images_BCHW: Tensor, patch_px: int, merged: int) -> tuple[Tensor, int, int]:
    """Pictures, resized to about PIXELS pixels, as Qwen2-VL's processor cuts them (B, P, D); their rows and columns."""
    height, width = images_BCHW.shape[2:]
    shape = smart_resize(height, width, patch_px * merged, PIXELS, PIXELS)
    x_BCHW = Preprocess(patch_px).resized(images_BCHW, shape)
    rows, columns = (side // patch_px for side in shape)
    x = x_BCHW[:, None].expand(-1, TEMPORAL, -1, -1, -1)
    x = x.reshape(len(x), TEMPORAL, 3, rows // merged, merged, patch_px, columns // merged, merged, patch_px)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4), rows, columns


def from_published(state: State, source: str) -> tuple[State, State]:
    """The weights of the network, by the names of today's transformers, and of the head; those of words are left out.

    Raises:
        RewardError: a name that the published model does not have.
    """
    network, head = {}, {}
    for name, value in state.items():
        if name.startswith(_HEAD):
            head[name.removeprefix(_HEAD)] = value
        elif not name.startswith("lm_head."):
            network[_renamed(name, source)] = value
    return network, head


def _renamed(name: str, source: str) -> str:
    if name.startswith("visual."):
        return name
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise RewardError(f"{source}: {name} is unknown")


def hpsv3(files: Path) -> HpsV3:
    """HPSv3, in the types in which it was published (bf16, its head in fp32)."""
    source, folder = HPSV3.names[0], locate(QWEN, files)
    network, head = from_published(load_file(locate(HPSV3, files) / source), source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(REWARD, special=True)])
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    with torch.device("meta"):
        expected = Qwen2VLModel(config).state_dict()
    check_names(expected, network, source)
    model: Any = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=network, dtype=network[_WORDS].dtype, attn_implementation="sdpa"
    )
    own = Head(config.text_config.hidden_size)
    check_names(own.state_dict(), head, source)
    own.load_state_dict(head)
    return HpsV3(model, own, tokenizer)
