"""The published models at their full size, without weights: transformer, autoencoder and schedule of each preset.

The sizes are those of the models' own config files; tests hold them to the published numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import BlipVisionModel, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from benchmarks.train_step import words
from rewards import imagereward
from rewards.aesthetic import Head
from rewards.clip import ClipReward
from rewards.hps import vit_h_14
from rewards.imagereward import ImageReward
from student.families.family import Condition, Family
from student.families.flux import Flux
from student.families.flux2 import Flux2
from student.families.qwen_image import QwenImage
from student.families.sd3 import SD3
from student.families.wan import Wan
from student.families.z_image import ZImage
from student.tokens import CHATS

DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Model:
    """How one model is made (on the meta device), and how long and wide its conditions are.

    With a ``boundary`` it has two transformers of the same size.
    """

    family: type[Family]
    transformer: Callable[[], nn.Module]
    vae: Callable[[], nn.Module]
    tokens: tuple[int, int]
    pooled: int = 0
    scheduler: Callable[[], Any] = lambda: FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    cell_px: int = 8
    boundary: float | None = None  # of two experts
    baked: ClassVar[Mapping[str, Any]] = {}


def _image_autoencoder(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def _flux_autoencoder() -> AutoencoderKL:
    return _image_autoencoder(scaling_factor=0.3611, shift_factor=0.1159)


def _sd35_medium() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
        pooled_projection_dim=2048,
        joint_attention_dim=4096,
        in_channels=16,
        out_channels=16,
    )


def wan_transformer(heads: int, width: int, channels: int, layers: int = 30) -> Callable[[], WanTransformer3DModel]:
    """How a transformer of Wan is made."""
    return lambda: WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=width, in_channels=channels, out_channels=channels, num_layers=layers
    )


def _wan_22_autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )


def _klein() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def unipc() -> UniPCMultistepScheduler:
    """The scheduler that Wan is published with."""
    return UniPCMultistepScheduler(flow_shift=3.0, **FLOW)


MODELS: Mapping[str, Model] = {
    "flux-dev": Model(Flux, lambda: FluxTransformer2DModel(guidance_embeds=True), _flux_autoencoder, (512, 4096), 768),
    "sd35-medium": Model(
        SD3,
        _sd35_medium,
        lambda: _image_autoencoder(scaling_factor=1.5305, shift_factor=0.0609),
        (333, 4096),
        2048,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    "wan-1.3b": Model(Wan, wan_transformer(12, 8960, 16), AutoencoderKLWan, (512, 4096), scheduler=unipc),
    "wan-2.2-5b": Model(
        Wan, wan_transformer(24, 14336, 48), _wan_22_autoencoder, (512, 4096), scheduler=unipc, cell_px=16
    ),
    "wan-14b": Model(
        Wan, wan_transformer(40, 13824, 16, 40), AutoencoderKLWan, (512, 4096), scheduler=unipc, boundary=0.875
    ),
    "flux2-klein": Model(Flux2, _klein, AutoencoderKLFlux2, (512, 7680)),
    "qwen-image": Model(QwenImage, QwenImageTransformer2DModel, AutoencoderKLQwenImage, (512, 3584)),
    "z-image-turbo": Model(
        ZImage,
        ZImageTransformer2DModel,
        _flux_autoencoder,
        (512, 2560),
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
}


class _Chat:
    """In place of a tokenizer that says the family's own chat, or is CLIP's."""

    model_max_length = 77

    def __init__(self, family: str) -> None:
        self._chat = CHATS.get(family)

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        assert self._chat is not None
        return self._chat.of(messages[0]["content"])


def without_weights(model: Model) -> Family:
    """The family around its networks on the meta device; it has no encoders, and is told no prompts yet."""
    with torch.device("meta"):
        transformer, vae = (make().requires_grad_(False).eval() for make in (model.transformer, model.vae))
        second = None if model.boundary is None else model.transformer().requires_grad_(False).eval()
    encoders = dict.fromkeys(model.family.encoders)
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = SimpleNamespace(
        transformer=transformer,
        vae=vae,
        scheduler=model.scheduler(),
        vae_scale_factor=model.cell_px,
        vae_scale_factor_spatial=model.cell_px,
        vae_scale_factor_temporal=4,
        transformer_2=second,
        config=SimpleNamespace(boundary_ratio=model.boundary, expand_timesteps=model.cell_px == 16, is_distilled=False),
        **encoders,
        **dict.fromkeys(names, _Chat(model.family.name)),
    )
    return model.family(pipe, max_tokens=model.tokens[0])


def hps() -> ClipReward:
    """HPS v2.1, which the presets train on, on the meta device."""
    with torch.device("meta"):
        return ClipReward(CLIPModel(vit_h_14()), words, fit="pad")


def image_reward() -> ImageReward:
    """ImageReward, which the presets hold out, on the meta device."""
    arch = imagereward.published()
    with torch.device("meta"):
        text, vision = BlipTextModel(arch.text, add_pooling_layer=False), BlipVisionModel(arch.vision)
        return ImageReward(text, vision, Head(arch.text.hidden_size), words)


def condition(model: Model, prompts: Sequence[str], device: torch.device) -> Condition:
    """As many tokens as a prompt of full length has, on the device."""
    length, width = model.tokens
    tokens_BLE = torch.ones(len(prompts), length, width, dtype=torch.bfloat16, device=device)
    pooled_BP = torch.ones(len(prompts), model.pooled, dtype=torch.bfloat16, device=device) if model.pooled else None
    return Condition(tokens_BLE, pooled_BP)
