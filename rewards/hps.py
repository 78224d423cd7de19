"""HPS v2.1 (Wu et al. 2023): the cosine of a CLIP ViT-H/14 that was tuned on human choices.

Its checkpoint is a state dict of open_clip, mapped here, name by name, onto transformers' CLIPModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rewards.checkpoint import State, fill, tensors
from rewards.clip import CLIP_H_VOCABULARY, ClipReward
from rewards.files import Published, locate
from rewards.interface import RewardError

HPS = Published("xswu/HPSv2", ("HPS_v2.1_compressed.pt",))

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_LAYER["attn.out_proj"] = "self_attn.out_proj"
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_UNUSED = {"attn_mask"}  # the causal mask, a buffer that some releases saved


def vit_h_14() -> CLIPConfig:
    """open_clip's ViT-H-14: heads of 64 in the text tower and of 80 in the image tower, and the exact GELU."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    vision |= {"patch_size": 14, "image_size": 224}
    shared = {"hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=1024)


def from_open_clip(state: Mapping[str, Tensor], source: str) -> State:
    """open_clip's names and layouts -> transformers'.

    Raises:
        RewardError: a name that open_clip's CLIP does not have; ``source`` names the checkpoint.
    """
    renamed: State = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if name in _NAMES:
            renamed[_NAMES[name]] = value
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
        elif block and block[3] == "attn.in_proj":
            layer = f"{_layer(block)}.self_attn"
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.{part}_proj.{block[4]}"] = piece.contiguous()
        elif block and block[3] in _LAYER:
            renamed[f"{_layer(block)}.{_LAYER[block[3]]}.{block[4]}"] = value
        elif name not in _UNUSED:
            raise RewardError(f"{source}: {name} is unknown")
    return renamed


def _layer(block: re.Match[str]) -> str:
    return f"{'vision_model' if block[1] else 'text_model'}.encoder.layers.{block[2]}"


def hps(files: Path, config: CLIPConfig | None = None) -> ClipReward:
    """HPS v2.1: the plain cosine, about 0.15 to 0.4 (papers print it times 100).

    open_clip first repairs broken Unicode and HTML entities in prompts; here that is left to the author of the prompts.
    """
    state = from_open_clip(tensors(HPS, files, "state_dict"), HPS.names[0])
    clip = fill(CLIPModel, config or vit_h_14(), state, HPS.names[0])
    tokenizer = CLIPTokenizer.from_pretrained(locate(CLIP_H_VOCABULARY, files))
    return ClipReward(clip, tokenizer, fit="pad")
