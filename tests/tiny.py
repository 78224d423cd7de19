"""A whole student of the real classes, random and tiny, made in a second: what the tests draw with.

``build(path)`` writes a FluxPipeline that diffusers opens, with word-level tokenizers and a student.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from rewards import shapes
from student.bundle import ImageSize, Latents, RewardReference, Scorer, Student
from student.files import hash_weights, write_student
from student.pipeline import save_pipeline
from student.schedule import sigmas

MAX_TOKENS = 24
CLIP_TOKENS = 20  # not MAX_TOKENS, so that a mix-up of the two tokenizers shows
SPECIALS = ("<pad>", "<eos>", "<unk>")  # an end token with id 2 would make CLIPTextModel pool at the highest id
WORDS = tuple(
    "a on of left right above below small large red green blue heart star circle ring gray background".split()
)
PROMPTS = (
    "a small red heart above a large blue star on a gray background",
    "A LARGE green ring",
    "an unknown zebra of red",
    "",
    "red " * 40,
    "a blue circle, left of a red ring.",
    "star",
)


def tokenizer(words: Sequence[str] = WORDS, length: int = CLIP_TOKENS) -> PreTrainedTokenizerFast:
    """Word-level and lower-cased: an unknown word is <unk>, a prompt ends in <eos> and is padded with <pad>."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def pipeline(seed: int = 0, width: int = 32, heads: int = 2, double: int = 1, single: int = 1) -> FluxPipeline:
    """A random pipeline; ``width`` is the transformer's, and ``heads`` must divide it into multiples of 8."""
    torch.manual_seed(seed)
    words = tokenizer()
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": heads}
    clip = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=CLIP_TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **text,
    )
    t5 = T5Config(
        vocab_size=len(words), d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=1, num_heads=heads
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_autoencoder(width=min(width, 32)),
        text_encoder=CLIPTextModel(clip),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer(length=MAX_TOKENS),
        transformer=_transformer(width, heads, double, single),
    )
    _enliven(pipe)
    return pipe


def build(path: Path, scorers: dict[str, Scorer] | None = None, **pipeline_options: Any) -> Student:
    """Write the pipeline and its student.json to ``path``."""
    pipe = pipeline(**pipeline_options)
    save_pipeline(pipe, path)
    return write_student(path, student(scorers or {}, vae=pipe.vae.config))


def scorers(folder: Path) -> dict[str, Scorer]:
    """Two small random scorers of the real classes, saved in ``folder``, and what student.json says of them."""
    rows = {}
    for role, kind, mean, std in (("trained", "query", 0.1, 0.02), ("heldout", "clip", -0.3, 0.5)):
        torch.manual_seed(len(rows))
        config = shapes.ScorerConfig(
            kind=kind,
            vocab_size=len(tokenizer()),
            max_tokens=CLIP_TOKENS,
            eos_token_id=1,
            pad_token_id=0,
            text_width=16,
            text_layers=1,
            width=16,
        )
        shapes.save(shapes.build(config), folder / role)
        rows[role] = Scorer(f"scorers/{role}.onnx", mean, std, role, hash_weights(folder / role))  # type: ignore[arg-type]
    return rows


def student(scorers: dict[str, Scorer], vae: Any = None) -> Student:
    """A manifest with two trained step counts; with ``vae`` None it describes no weights (for the fake runtime)."""
    return Student(
        id="tiny",
        version="1",
        family="flux",
        steps=(4, 2),
        sigmas={4: sigmas(4), 2: sigmas(2, shift=2.0)},
        latents=Latents(
            height=8,
            width=8,
            channels=16,
            packing=2,
            scaling_factor=vae.scaling_factor if vae else 1.0,
            shift_factor=vae.shift_factor if vae else 0.0,
        ),
        image=ImageSize(height=64, width=64),
        max_tokens=MAX_TOKENS,
        baked={},
        teacher="tiny-teacher",
        scorers=scorers,
        reward_reference={name: RewardReference(0.1, 0.9, {"1": -2.0, "50": 0.1, "99": 2.0}) for name in scorers},
        evaluation=({"model": "tiny", "steps": 4, "scorer": 0.1},),
    )


def _transformer(width: int, heads: int, double: int, single: int) -> FluxTransformer2DModel:
    head = width // heads
    third = head // 3 // 2 * 2
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=False,
        axes_dims_rope=(head - 2 * third, third, third),
    )


def _autoencoder(width: int) -> AutoencoderTiny:
    """The starter's form; its scale and shift are not 1 and 0, so that forgetting or swapping them shows."""
    return AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 0),
        scaling_factor=0.6,
        shift_factor=0.15,
    )


def _enliven(pipe: FluxPipeline) -> None:
    """Random weights answer almost with a constant: raise what dampens time, text and pixels, so that errors show."""
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if weight.ndim > 1 and ("norm" in name or "proj_out" in name or "embed" in name):
                weight.normal_(std=weight.shape[1] ** -0.5)
        for weight in pipe.vae.decoder.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.4 * weight[0].numel() ** -0.5)
        pixels = pipe.vae.decode(torch.randn(4, 16, 8, 8)).sample + 1  # the decoder ends in 2 y - 1
        last = list(pipe.vae.decoder.layers)[-1]
        last.weight /= 4 * pixels.std()  # real latents are larger than these: few pixels may clip
        last.bias.fill_(0.5)
