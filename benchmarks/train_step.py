"""``python -m benchmarks.train_step``: what one RATS step of FLUX.1-dev costs, by gradient mode.

The step is the trainer's own: the roles of a network with their adapters, the objective with decoder and reward, the
optimizer, the moving average. All networks have random weights: the 12 B transformer, FLUX's autoencoder, and a reward
of PickScore's size (CLIP ViT-H/14). Everywhere: floating-point operations at full size, counted by torch on the meta
device, which holds no weights. With a GPU of 60 GB or more: seconds and memory of the same step. Else: seconds of small
networks of the same form. The paper's figures (arXiv 2604.14910): 7.57 s, 67.67 GB and 1229.6 TFLOP a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar
from unittest.mock import patch

import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from rewards.clip import ClipReward
from student.families.family import Condition
from student.families.flux import Flux
from training.config import changed
from training.experiment.presets import flux_dev
from training.progress import quiet
from training.rats.config import RatsConfig
from training.rats.method import Batch
from training.rats.rats import Rats
from training.rats.roles import Roles

PAPER = {"s": 7.57, "gb": 67.67, "tflop": 1229.6}
MODES = ("full", "last_k", "detached")
CEILING_TFLOPS = 790.0  # measured bf16 matrix products of an H200
PROMPT, TEXT_TOKENS, CLIP_TOKENS = "a red heart", 512, 77
SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}  # FLUX.1-dev's own
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """Arguments of the networks' classes where they differ from FLUX.1-dev's and ViT-H's."""

    transformer: Mapping[str, Any]
    channels: tuple[int, ...]
    vision: Mapping[str, int]
    text: Mapping[str, int]


VISION = {"patch_size": 14, "image_size": 224}
FULL = Size(
    {},
    (128, 256, 512, 512),
    {**VISION, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
)
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = Size(
    {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4}, (32, 32, 64, 64), {**VISION, **NARROW}, NARROW
)
IN_AND_OUT = (
    "In a step: one sample; the teacher's rollout by the second adapter; the student's rollout and its gradient, every "
    "block computed again; two decodings and two rewards, the student's with gradient; AdamW; the moving average.",
    "In the memory: all weights (transformer, autoencoder and adapters as a run holds them, the reward in fp32).",
    "Not in it: text encoders (a run encodes its prompts once and lets them go), validations, and checkpoints.",
)


class Unprompted(Flux):
    """FLUX without text encoders: every prompt is the same random tokens."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The tokens (B, 512, 4096) and the pooled vector, on the transformer's device."""
        config, num = self.transformer.config, len(prompts)
        tokens_BLE = torch.randn(num, TEXT_TOKENS, config.joint_attention_dim, device=self.device)
        return Condition(tokens_BLE, torch.randn(num, config.pooled_projection_dim, device=self.device))


def family(size: Size, device: str) -> Unprompted:
    """FLUX.1-dev's transformer and autoencoder with random weights in bf16."""
    transformer = _random(lambda: FluxTransformer2DModel(guidance_embeds=True, **size.transformer), device)
    blocks = len(size.channels)
    vae = _random(
        lambda: AutoencoderKL(
            block_out_channels=size.channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        device,
    )
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    pipe = SimpleNamespace(transformer=transformer, vae=vae, scheduler=scheduler, vae_scale_factor=8, **absent)
    return Unprompted(pipe, max_tokens=TEXT_TOKENS)


def _random(make: Callable[[], Module], device: str) -> Module:
    """A frozen network in bf16 that was never held in fp32, which for 12 B weights would be what the peak shows."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            module = make().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    if device == "meta":
        return module
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


def reward(size: Size, device: str) -> ClipReward:
    """PickScore's form with random weights, in fp32 as the published one is opened."""
    towers = {"vision_config": dict(size.vision), "text_config": {**size.text, "max_position_embeddings": CLIP_TOKENS}}
    with torch.device(device):
        clip = CLIPModel(CLIPConfig(**towers, projection_dim=size.text["hidden_size"]))
    return ClipReward(clip, words, scaled=True)


def words(prompts: Sequence[str], **_: object) -> Any:
    """In place of a tokenizer: as many ones as CLIP reads, for each prompt."""
    ids_BL = torch.ones(len(prompts), CLIP_TOKENS, dtype=torch.int64)
    return SimpleNamespace(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))


def method(config: RatsConfig, size: Size, device: str) -> Rats:
    """What the trainer holds of a run."""
    model = family(size, device)
    with torch.device(device):  # else adapters of a base on the meta device would lie on the CPU
        roles = Roles.of(config, model)
    grids = {nfe: model.sigmas(nfe, _shape(config)) for nfe in (*config.student.nfe, config.teacher.nfe)}
    return Rats(config, roles, reward(size, device).score, grids)


def _shape(config: RatsConfig) -> tuple[int, ...]:
    return (16, config.image.height_px // 8, config.image.width_px // 8)


def gradient(rats: Rats, device: str) -> None:
    """One sample's loss and its gradient."""
    noise_BCHW = torch.randn(1, *_shape(rats.config), device=device)
    [batch] = rats.teach([Batch(0, 0, rats.config.student.nfe[0], [PROMPT], noise_BCHW)])
    rats.step(batch).backward()


def tflop(config: RatsConfig, size: Size) -> float:
    """Counted on the meta device with a teacher of one step; its other steps are all the same."""
    rats = method(changed(config, {"teacher.nfe": 1}), size, "meta")
    # What is only logged is read as 0.
    with patch.object(Tensor, "item", lambda _: 0.0), FlopCounterMode(display=False) as step:
        gradient(rats, "meta")
    model = rats.roles.model
    with FlopCounterMode(display=False) as forward, torch.no_grad(), rats.roles.role("teacher"):
        model.velocity(torch.randn(1, *_shape(config), device="meta"), 0.5, model.encode([PROMPT]))
    return float(step.get_total_flops() + (config.teacher.nfe - 1) * forward.get_total_flops()) / 1e12


def measure(config: RatsConfig, size: Size, device: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and peak memory in GB of steps alone (0 without a GPU)."""
    rats = method(config, size, device)
    roles = rats.roles
    optimizer = torch.optim.AdamW(roles.trainable, config.optim.lr)
    times = []
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):  # the first makes the optimizer's state and warms up
        start = time.perf_counter()
        gradient(rats, device)
        torch.nn.utils.clip_grad_norm_(roles.trainable, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        roles.follow()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return sorted(times[1:])[len(times[1:]) // 2], peak


def row(config: RatsConfig, counted: Size, repeats: int) -> list[str]:
    """One gradient mode's cells."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain, recomputed = (tflop(changed(config, {"compute.checkpointing": again}), counted) for again in (False, True))
    took_s, peak_gb = measure(config, FULL if _large() else SMALL, device, repeats)
    share = f"{recomputed / took_s / CEILING_TFLOPS:.0%}" if _large() else ""
    memory = f"{peak_gb:.1f}" if peak_gb else ""
    return [config.gradient.mode, f"{plain:.1f}", f"{recomputed:.1f}", f"{took_s:.2f}", memory, share]


def _large() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 60e9


def main(
    nfe: Annotated[int, typer.Option(help="The student's steps.")] = 3,
    teacher_nfe: Annotated[int, typer.Option(help="The teacher's steps.")] = 50,
    side_px: Annotated[int, typer.Option(help="The picture's side.")] = 512,
    lora_rank: Annotated[int, typer.Option(help="0 trains all weights.")] = 32,
    repeats: Annotated[int, typer.Option(help="Steps that are timed.")] = 3,
    small: Annotated[bool, typer.Option(help="Count the small networks' operations too, to try the plumbing.")] = False,
) -> None:
    """Print one table: operations counted, and what was measured here beside the paper's figures."""
    quiet()
    sides = {"image.height_px": side_px, "image.width_px": side_px}
    counts = {"student.nfe": (nfe,), "teacher.nfe": teacher_nfe, "lora.rank": lora_rank}
    config = changed(flux_dev(), {**counts, **sides})
    where = "cuda" if torch.cuda.is_available() else "cpu"
    measured = f"s a step ({where}, {'full size' if _large() else 'small'})"
    counted = "TFLOP, small" if small else "TFLOP, full size"
    table = Table("mode", counted, "and recomputing", measured, "peak GB", "share of the ceiling")
    table.add_row("paper, FLUX.1-dev", f"{PAPER['tflop']:.1f}", "", f"{PAPER['s']:.2f}", f"{PAPER['gb']:.1f}", "")
    for mode in MODES:
        table.add_row(*row(changed(config, {"gradient.mode": mode}), SMALL if small else FULL, repeats))
    console = Console()
    console.print(table)
    for line in IN_AND_OUT:
        console.print(line)
    if not _large():
        console.print("No GPU of 60 GB or more: the seconds are those of small networks and say nothing of FLUX.1-dev.")


if __name__ == "__main__":
    typer.run(main)
