"""Tiny random pipelines of the real classes, one for each family; tokenizers of the real classes too.

What dampens time, text and pixels in fresh random weights is raised, so that a mistake there shows in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from student.bundle import ImageSize, Latents, Student
from student.families.find import family_of
from student.files import write_student
from student.pipeline import save_pipeline, shift_no_more
from student.schedule import by_size
from tests.student.families.parts import CHANNELS, autoencoder, ready
from tests.student.families.tiny_chat import flux2, qwen_image, z_image

PROMPTS = ("a red heart above a blue star", "", "Ring &amp; circle,   left of it. " * 12)
SIZE = ImageSize(64, 32)
CLIP_TOKENS, MAX_TOKENS = 20, 24  # not the same, so that a mix-up of the tokenizers shows
FLUX_DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}  # FLUX.1-dev's own


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte by byte: 256 letters, the same at a word's end, ``!`` among them (SD3 pads its second CLIP with it)."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Letter by letter."""
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.&;"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def flux(guidance_embeds: bool = False, scheduler: Any = None, seed: int = 0) -> FluxPipeline:
    """FLUX.1: dev with ``guidance_embeds``, else schnell."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipe = FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**FLUX_DYNAMIC),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(_clip_config(clip, 16, 0)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(_t5_config(t5, T5Config)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    return ready(pipe)


def sd3(with_t5: bool = True, dual: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 (``dual``: query/key norms and a second attention, as in medium) or 3."""
    torch.manual_seed(seed)
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=CLIPTextModelWithProjection(_clip_config(clip, 16, 8)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(clip_2, 8, 4)),
        tokenizer_2=clip_2,
        text_encoder_3=T5EncoderModel(_t5_config(t5, T5Config)) if with_t5 else None,
        tokenizer_3=t5 if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        ),
    )
    return ready(pipe)


WAN_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}


def wan(seed: int = 0) -> WanPipeline:
    """Wan 2.1 text to video, with the UniPC scheduler that it is published with."""
    torch.manual_seed(seed)
    return _wan(_wan_autoencoder(), _wan_transformer())


def wan_5b(seed: int = 0) -> WanPipeline:
    """Wan 2.2 5B: an autoencoder of 16 pixels a cell, and a time for each token."""
    torch.manual_seed(seed)
    vae = _wan_autoencoder(
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, decoder_base_dim=8
    )
    return _wan(vae, _wan_transformer(), flow_shift=5.0, expand_timesteps=True)


def wan_14b(seed: int = 0) -> WanPipeline:
    """Wan 2.2 14B: an expert for sigmas from 7/8, and one for those below."""
    torch.manual_seed(seed)
    vae, high, low = _wan_autoencoder(), _wan_transformer(), _wan_transformer()
    return _wan(vae, high, transformer_2=low, boundary_ratio=0.875)


def _wan(vae: Any, transformer: Any, flow_shift: float = 3.0, **options: Any) -> Any:
    t5 = t5_tokenizer()
    pipe = WanPipeline(
        tokenizer=t5,
        text_encoder=UMT5EncoderModel(_t5_config(t5, UMT5Config)),
        vae=vae,
        scheduler=UniPCMultistepScheduler(flow_shift=flow_shift, **WAN_FLOW),
        transformer=transformer,
        **options,
    )
    return ready(pipe)


def _wan_autoencoder(**options: Any) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.9, -0.3],
        latents_std=[2.8, 1.4, 2.3, 0.6],
        **options,
    )


def _wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


MAKERS: Mapping[str, Callable[..., Any]] = {
    "flux": flux,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "sd3": sd3,
    "wan": wan,
    "wan_5b": wan_5b,
    "wan_14b": wan_14b,
    "z_image": z_image,
}


def build(
    path: Path, pipe: Any, steps: tuple[int, ...] = (3, 2), height_px: int = 64, width_px: int = 32, frames: int = 1
) -> Student:
    """Save the pipeline as a student that was trained for these step counts; videos of one frame, if of videos."""
    family = family_of(pipe, max_tokens=MAX_TOKENS)
    latents = family.geometry(height_px, width_px, frames)
    size = ImageSize(height_px, width_px, frames if latents.frames else None)
    student = manifest(family, steps, latents, size)
    shift_no_more(pipe)
    save_pipeline(pipe, path)
    return write_student(path, student)


def manifest(family: Any, steps: tuple[int, ...], latents: Latents, size: ImageSize = SIZE) -> Student:
    """The content of student.json."""
    return Student(
        id=f"tiny-{family.name}",
        version="1",
        family=family.name,
        steps=steps,
        sigmas={nfe: family.sigmas(nfe, latents.shape) for nfe in steps},
        latents=latents,
        image=size,
        max_tokens=MAX_TOKENS,
        baked=family.baked,
        teacher="tiny",
        scorers={},
        schedule=by_size(family.scheduler_config),
    )


def _clip_config(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(tokenizer: T5Tokenizer, kind: Any) -> Any:
    return kind(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
