"""The published models as ``benchmarks.serving_memory`` measures them: their encoders' sizes, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.full_size import MODELS, Model
from student.tokens import CHATS

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "tokens_per_second": 2,
}  # fmt: skip


def _clip(sizes: Mapping[str, int]) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=sizes["hidden_size"]))


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32128, **XXL))


def _umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))


def _qwen25() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN25_7B, vision_config=VISION))


@dataclass(frozen=True)
class Case:
    """One row: a published model with its encoders and the lengths of what they read, and the size that is drawn."""

    name: str
    model: Model
    encoders: tuple[Callable[[], nn.Module], ...]
    ids: tuple[int, ...]
    height: int = 1024
    width: int = 1024
    frames: int = 1

    @property
    def size(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.width}x{self.height}{frames}"


def _chat(family: str, length: int = 512) -> tuple[int, int]:
    return (length + CHATS[family].dropped,) * 2


FLUX = MODELS["flux-dev"]
SCHNELL = replace(FLUX, transformer=lambda: FluxTransformer2DModel(guidance_embeds=False), tokens=(256, 4096))
CLIPS = (lambda: _clip(CLIP_L), lambda: _clip(CLIP_G))
FLUX_ENCODERS = (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), _t5)
CASES = (
    Case("FLUX.1-dev", FLUX, FLUX_ENCODERS, (77, 512)),
    Case("FLUX.1-schnell", SCHNELL, FLUX_ENCODERS, (77, 256)),
    Case("Stable Diffusion 3.5 medium", MODELS["sd35-medium"], (*CLIPS, _t5), (77, 77, 256)),
    Case(
        "FLUX.2 klein 4B", MODELS["flux2-klein"], (lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)),), _chat("flux2")
    ),
    Case("Qwen-Image", MODELS["qwen-image"], (_qwen25,), _chat("qwen_image")),
    Case("Z-Image", MODELS["z-image-turbo"], (lambda: Qwen3Model(Qwen3Config(**QWEN3_4B)),), _chat("z_image")),
    Case("Wan 2.1 1.3B", MODELS["wan-1.3b"], (_umt5,), (512, 512), 480, 832, 81),
    Case("Wan 2.2 5B", MODELS["wan-2.2-5b"], (_umt5,), (512, 512), 704, 1280, 121),
    Case("Wan 2.2 14B", MODELS["wan-14b"], (_umt5,), (512, 512), 720, 1280, 81),
)
