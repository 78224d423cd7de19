"""Published pipelines, tiny and random, and the command that adopts them: what the tests of adoption share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from typer.testing import CliRunner

from export import adopt as command
from student.noise import noise
from student.sampler import pack
from tests.student.families import tiny

PROMPTS = ("a red heart above a blue star", "ring", "a heart, left of it", "blue", "star on red", "x", "y", "a b c")


def published(folder: Path, pipe: Any, **options: Any) -> Path:
    """A pipeline as its authors publish it: saved by diffusers itself, with a card."""
    pipe.save_pretrained(folder, **options)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Its card\n")
    return folder


def schnell() -> Any:
    return tiny.flux(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))


MODELS: dict[str, Callable[[], Any]] = {
    "schnell": schnell,
    "dev": lambda: tiny.flux(guidance_embeds=True),
    "turbo": tiny.sd3,
}


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and what is printed, as one line."""
    app_arguments = [str(part) for part in arguments]
    app = typer.Typer()
    app.command()(command.adopt)
    result = CliRunner().invoke(app, app_arguments)
    return result.exit_code, " ".join(result.output.split())


def own_picture(
    folder: Path, steps: int, prompt: str, seed: int, prepare: Callable[[Any], object] = bool, **call: Any
) -> np.ndarray:
    """What the published pipeline itself draws when it is asked for nothing but a number of steps."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    flux = type(pipe).__name__ == "FluxPipeline"
    latents = torch.from_numpy(noise([seed], (tiny.CHANNELS, 8, 4)))
    picture = pipe(
        prompt, num_inference_steps=steps, height=64, width=32, output_type="np",
        latents=pack(latents) if flux else latents, **call,
    ).images  # fmt: skip
    return np.asarray(picture).transpose(0, 3, 1, 2)


def a_lora(pipe: Any) -> dict[str, torch.Tensor]:
    """A LoRA of random factors on attention and feed-forward layers, in diffusers' own names."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn.to_q", "attn.to_out.0", "ff.net.2"])
    pipe.transformer.add_adapter(config, "x")
    gen = torch.Generator().manual_seed(3)
    return {
        f"transformer.{key}": torch.randn(value.shape, generator=gen) * 0.3
        for key, value in get_peft_model_state_dict(pipe.transformer, adapter_name="x").items()
    }


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
