"""Tiny pipelines of the families whose prompts a language model reads, and their tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from student.prompts import CHATS
from tests.student.families.parts import CHANNELS, autoencoder, ready

# What Qwen3's own template says of one question, with and without room to think.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
FLUX2_DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
QWEN_DYNAMIC = {  # Qwen-Image's own
    "use_dynamic_shifting": True,
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def chat_tokenizer(family: str, side: str = "right") -> Qwen2Tokenizer:
    """Byte by byte; what stands before a prompt in the family's chat is as many tokens as the family drops."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], padding_side=side, chat_template=TEMPLATE)
    chat = CHATS[family]
    words = ["<|im_start|>", "<|im_end|>", "<think>\n\n</think>\n\n", "user\n", "assistant\n"]
    if chat.dropped:
        words = [*_pieces(chat.before, chat.dropped), chat.after]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return tokenizer


def _pieces(text: str, count: int) -> list[str]:
    """The text in so many pieces, of about the same length."""
    ends = [len(text) * i // count for i in range(count + 1)]
    return [text[at:end] for at, end in zip(ends, ends[1:], strict=False)]


def flux2(is_distilled: bool = True, seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2 klein, or its base."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer("flux2")
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX2_DYNAMIC),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen3(tokenizer, layers=28)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=is_distilled,
    )
    return ready(pipe)


def z_image(side: str = "right", seed: int = 0) -> ZImagePipeline:
    """Z-Image-Turbo."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer("z_image", side)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(_qwen3(tokenizer, layers=3)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 16, 16],
        ),
    )
    torch.nn.init.normal_(pipe.transformer.x_pad_token)
    torch.nn.init.normal_(pipe.transformer.cap_pad_token)
    return ready(pipe)


def qwen_image(scheduler: Any = None, seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer("qwen_image")
    pipe = QwenImagePipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**QWEN_DYNAMIC),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.7, 0.1, 0.9, -0.3],
            latents_std=[2.8, 1.4, 2.3, 0.6],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen25_vl(tokenizer)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    return ready(pipe)


def _qwen3(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )


def _qwen25_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    special = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
