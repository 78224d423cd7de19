"""``python -m benchmarks.train_step``: what one RATS step of FLUX.1-dev costs, by gradient mode.

Everywhere: floating-point operations of the full-size transformer (12 B, on the meta device, so that no weights are
held), counted by torch while our own code runs. With a GPU of 60 GB or more: seconds and memory of the same step with
random weights. Else: seconds of a small transformer of the same form. The paper's figures (arXiv 2604.14910):
7.57 s, 67.67 GB and 1229.6 TFLOP a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from student.schedule import sigmas
from training.rats.gradients import differentiate
from training.rats.networks import LORA_TARGETS
from training.rats.trajectory import Trajectory, rollout

PAPER = {"s": 7.57, "gb": 67.67, "tflop": 1229.6}
TEXT_TOKENS, GUIDANCE = 512, 3.5
CEILING_TFLOPS = 790.0  # measured bf16 matrix products of an H200


@dataclass(frozen=True)
class Step:
    """One sample's step: the student's and the teacher's step counts, the picture's side."""

    nfe: int = 3
    teacher_nfe: int = 50
    side_px: int = 512

    @property
    def tokens(self) -> int:
        """Packed image tokens: one for 16 x 16 pixels."""
        return (self.side_px // 16) ** 2


def transformer(device: str, lora_rank: int, small: bool = False) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer with random weights in bf16; ``small`` has 6 of its 57 blocks."""
    size = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4} if small else {}
    with torch.device(device):
        model = FluxTransformer2DModel(guidance_embeds=True, **size).to(torch.bfloat16)
    model.requires_grad_(lora_rank == 0)
    if lora_rank:
        model.add_adapter(LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS))
    return model


def field(model: FluxTransformer2DModel, step: Step, device: str) -> Callable[[Tensor, float], Tensor]:
    """The velocity of packed latents (1, S, 64) for one random prompt."""
    config = model.config
    text = torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, config.pooled_projection_dim, device=device, dtype=torch.bfloat16)
    places = torch.zeros(step.tokens, 3, device=device)
    text_places = torch.zeros(TEXT_TOKENS, 3, device=device)

    def velocity(x_BSC: Tensor, sigma: float) -> Tensor:
        out: Tensor = model(
            hidden_states=x_BSC.to(torch.bfloat16),
            timestep=torch.full((1,), sigma, device=device),
            guidance=torch.full((1,), GUIDANCE, device=device),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=text_places,
            img_ids=places,
            return_dict=False,
        )[0]
        return out.float()

    return velocity


def one_step(model: FluxTransformer2DModel, step: Step, mode: str, device: str) -> None:
    """Teacher's rollout, student's rollout and its gradient; the loss is a sum over the horizons."""
    velocity = field(model, step, device)
    noise_BSC = torch.randn(1, step.tokens, 64, device=device)
    with torch.no_grad():
        teacher = rollout(velocity, noise_BSC, sigmas(step.teacher_nfe))

    def loss_of(student: Trajectory) -> Tensor:
        points = (*student.sigmas[1:], 0.0)
        return torch.stack([(student.data(s) - teacher.data(s)).square().mean() for s in points]).mean()

    _, backward = differentiate(mode, 1, velocity, noise_BSC, sigmas(step.nfe), loss_of)
    backward()


def tflop(step: Step, mode: str, lora_rank: int, recompute: bool) -> float:
    """Counted while ``one_step`` runs on the meta device, with a teacher of one step; its other steps are the same."""
    model = transformer("meta", lora_rank)
    if recompute:
        model.enable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter:
        one_step(model, replace(step, teacher_nfe=1), mode, "meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        field(model, step, "meta")(torch.randn(1, step.tokens, 64, device="meta"), 0.5)
    return (counter.get_total_flops() + (step.teacher_nfe - 1) * forward.get_total_flops()) / 1e12


def measure(model: nn.Module, step: Step, mode: str, device: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a step with its optimizer, and peak memory in GB (0 without a GPU)."""
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, 1e-5)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        one_step(model, step, mode, device)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return sorted(times[1:])[len(times[1:]) // 2], peak


def main(
    nfe: Annotated[int, typer.Option(help="The student's steps.")] = 3,
    teacher_nfe: Annotated[int, typer.Option(help="The teacher's steps.")] = 50,
    side_px: Annotated[int, typer.Option(help="The picture's side.")] = 512,
    lora_rank: Annotated[int, typer.Option(help="0 trains all weights.")] = 32,
    repeats: Annotated[int, typer.Option(help="Steps that are timed.")] = 3,
) -> None:
    """Print one table: operations counted, and what was measured here beside the paper's figures."""
    step = Step(nfe, teacher_nfe, side_px)
    large = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 60e9
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = "full size" if large else "small"
    table = Table(
        "mode", "TFLOP, full size", "and recomputing", f"s a step ({device}, {here})", "peak GB", "share of the ceiling"
    )
    table.add_row("paper, FLUX.1-dev", f"{PAPER['tflop']:.1f}", "", f"{PAPER['s']:.2f}", f"{PAPER['gb']:.1f}", "")
    for mode in ("full", "last_k", "detached"):
        plain, counted = (tflop(step, mode, lora_rank, recompute) for recompute in (False, True))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = transformer(device, lora_rank, small=not large)
        model.enable_gradient_checkpointing()
        took_s, peak_gb = measure(model, step, mode, device, repeats)
        share = f"{counted / took_s / CEILING_TFLOPS:.0%}" if large else ""
        table.add_row(
            mode, f"{plain:.1f}", f"{counted:.1f}", f"{took_s:.2f}", f"{peak_gb:.1f}" if peak_gb else "", share
        )
        del model
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
