"""The starter teacher: a real FluxPipeline small enough to train from scratch on a CPU.

Flow matching on autoencoder latents: x = (1 - sigma) * data + sigma * noise, velocity = noise - data.
Shape suffixes: B batch, C latent channels, H/W latent side, S packed image tokens, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel

from rewards import shapes as rewards
from student.pipeline import open_pipeline
from student.sampler import pack
from training import checkpoint
from training.optim import one_cycle, set_lr
from training.progress import steps
from training.shapes import pairs, prompts, vocabulary, world
from training.shapes.swapped import swap_some
from training.steplog import StepLog

TEXT_WIDTH = 128


@dataclass(frozen=True)
class TeacherConfig:
    """Defaults: about 4.4 M transformer parameters, 16 image tokens, 12 text tokens."""

    steps: int = 16_000
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.0
    width: int = 192
    double_blocks: int = 1
    single_blocks: int = 5
    caption_dropout: float = 0.1
    sigma_shift: float = 0.25
    ema: float = 0.999
    cached_batches: int = 2_500
    singles: float = 0.7  # the world's own third is too few: single objects lie anywhere, and their shapes came last
    spread: float = 0.5  # how far single objects lie from the centre, as a part of what the world allows
    start: str = ""  # a teacher to go on from
    swapped: float = 0.0  # the share of captions in which star and heart are exchanged (training/lab)
    seed: int = 307
    save_every: int = 250


@dataclass(frozen=True)
class Parts:
    """The networks that are trained; the autoencoder is not."""

    transformer: Any  # FluxTransformer2DModel
    clip: nn.Module
    t5: T5EncoderModel

    def modules(self) -> nn.ModuleDict:
        """All three as one module, so that they share a state dict."""
        return nn.ModuleDict({"transformer": self.transformer, "clip": self.clip, "t5": self.t5})


def build(config: TeacherConfig, latent_channels: int) -> Parts:
    """Fresh networks of the real classes; the packed latents have four times the channels."""
    tokenizer = vocabulary.tokenizer()
    end, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=32,
        num_attention_heads=config.width // 32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    clip = rewards.text_tower(
        rewards.ScorerConfig("query", len(tokenizer), vocabulary.MAX_TOKENS, end, pad, TEXT_WIDTH)
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=pad,
            eos_token_id=end,
        )
    )
    for encoder in (clip, t5):
        embeddings: Any = encoder.get_input_embeddings()
        vocabulary.compose(embeddings.weight)
    return Parts(transformer, clip, t5)


def opened(path: str) -> Parts:
    """The networks of a finished teacher, to be trained further."""
    pipe = open_pipeline(path)
    parts = Parts(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    parts.modules().train().requires_grad_(True)
    return parts


class LatentSource:
    """Batches of (packed latents, captions), a function of (seed, step); latents are kept for reuse."""

    def __init__(self, vae: AutoencoderTiny, config: TeacherConfig) -> None:
        self._vae = vae
        self._config = config
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Packed latents (B, 16, 64) and captions, which name different parts of a scene at each visit."""
        config = self._config
        chunk = step % config.cached_batches
        scenes = prompts.training_scenes(config.batch, config.seed, chunk, singles=config.singles, spread=config.spread)
        if chunk not in self._kept:
            self._kept[chunk] = encode(self._vae, world.render_NCHW(scenes)).half()
        gen = world.rng(config.seed, step, 2)
        texts = pairs.captions(scenes, prompts.training_styles(scenes, gen))
        texts = swap_some(texts, config.swapped, world.rng(config.seed, step, 6))
        dropped = gen.random(len(texts)) < config.caption_dropout
        return self._kept[chunk].float(), ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]


def encode(vae: Any, images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] -> packed latents in the scale that the transformer sees."""
    with torch.autocast("cpu", torch.bfloat16):
        z_BCHW = vae.encoder((images_BCHW * 2 - 1).to(memory_format=torch.channels_last)).float()
    return pack((z_BCHW.contiguous() - vae.config.shift_factor) * vae.config.scaling_factor)


def image_ids(side: int = 4) -> Tensor:
    """FluxPipeline's position ids of ``side`` x ``side`` packed tokens: (S, 3)."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None, :]
    return ids.reshape(-1, 3)


def velocity(parts: Parts, x_BSC: Tensor, sigma_B: Tensor, ids_BL: Tensor) -> Tensor:
    """The predicted velocity of packed latents, for prompts given as token ids."""
    pooled = parts.clip(ids_BL).pooler_output
    text_BLD = parts.t5(ids_BL).last_hidden_state
    result: Tensor = parts.transformer(
        hidden_states=x_BSC,
        timestep=sigma_B,
        pooled_projections=pooled,
        encoder_hidden_states=text_BLD,
        img_ids=image_ids(),
        txt_ids=torch.zeros(ids_BL.shape[1], 3),
        return_dict=False,
    )[0]
    return result


def loss(parts: Parts, data_BSC: Tensor, ids_BL: Tensor, config: TeacherConfig, step: int) -> Tensor:
    """Flow-matching loss; times are logit-normal, shifted towards noise by ``sigma_shift``."""
    gen = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    sigma_B = torch.sigmoid(config.sigma_shift + torch.randn(len(data_BSC), generator=gen))
    noise_BSC = torch.randn(data_BSC.shape, generator=gen)
    x_BSC = torch.lerp(data_BSC, noise_BSC, sigma_B[:, None, None])
    # The math backend: flash attention's backward is 1.8 times slower on a CPU at 32 tokens.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        v_BSC = velocity(parts, x_BSC, sigma_B, ids_BL)
    return F.mse_loss(v_BSC.float(), noise_BSC - data_BSC)


def optimizers(parts: Parts, config: TeacherConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside the transformer's blocks, AdamW for the rest; each with its peak learning rate."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in parts.modules().named_parameters():
        in_block = "transformer_blocks" in name and value.ndim == 2 and "norm" not in name
        (inner if in_block and config.muon_lr > 0 else rest).append(value)
    adam = torch.optim.AdamW(rest, config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if not inner:
        return [(adam, config.lr)]
    muon = torch.optim.Muon(inner, lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [(muon, config.muon_lr), (adam, config.lr)]


def train(config: TeacherConfig, run_dir: Path, until: int | None = None) -> Parts:
    """Train, or resume; ``until`` stops early. Returns the networks with averaged weights."""
    vae = AutoencoderTiny.from_pretrained(run_dir / "autoencoder").to(memory_format=torch.channels_last)
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(config.seed)
    parts = opened(config.start) if config.start else build(config, vae.config.latent_channels)
    modules = parts.modules()
    average = EMAModel(modules.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
    plan = optimizers(parts, config)
    first = _resume(run_dir / "teacher.pt", modules, average, plan)
    source = LatentSource(vae, config)
    log = StepLog(run_dir / "teacher.jsonl", first)
    for step in steps("teacher", first, min(until or config.steps, config.steps)):
        data_BSC, texts = source.batch(step)
        value = loss(parts, data_BSC, torch.tensor(vocabulary.encode(tokenizer, texts)), config, step)
        for optimizer, peak in plan:
            set_lr(optimizer, one_cycle(step, config.steps, peak))
            optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer, _ in plan:
            optimizer.step()
        average.step(modules.parameters())
        if step % 25 == 0:
            log.write(step, loss=value.item(), grad_norm=norm.item())
        if (step + 1) % config.save_every == 0:
            _save(run_dir / "teacher.pt", step + 1, modules, average, plan)
    log.close()
    average.copy_to(modules.parameters())
    return parts


def _save(
    path: Path, step: int, modules: nn.Module, average: EMAModel, plan: list[tuple[torch.optim.Optimizer, float]]
) -> None:
    state = {"step": step, "modules": modules.state_dict(), "average": average.state_dict()}
    checkpoint.save(path, {**state, "optimizers": [optimizer.state_dict() for optimizer, _ in plan]})


def _resume(path: Path, modules: nn.Module, average: EMAModel, plan: list[tuple[torch.optim.Optimizer, float]]) -> int:
    saved = checkpoint.load(path)
    if saved is None:
        return 0
    modules.load_state_dict(saved["modules"])
    average.load_state_dict(saved["average"])
    for (optimizer, _), state in zip(plan, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(saved["step"])


def pipeline(parts: Parts, vae: Any) -> FluxPipeline:
    """The parts as diffusers' own pipeline; shift 1, so that explicit sigmas are used as they are."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=parts.clip,
        tokenizer=vocabulary.tokenizer(),
        text_encoder_2=parts.t5,
        tokenizer_2=vocabulary.tokenizer(),
        transformer=parts.transformer,
    )


def num_parameters(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return int(np.sum([p.numel() for p in module.parameters()]))
