"""The laboratory's two teachers, each one network whose guidance is distilled into it.

"good" is the starter world's teacher. "heterogeneous" is the same after its training has gone on with the words star
and heart exchanged in most captions that contain either: it has learnt a mixture, and is wrong on these contents alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from student.families.find import open_family
from training.optim import one_cycle
from training.progress import console
from training.rundir import claim
from training.sampler import Sampler
from training.shapes import prompts, teacher, vocabulary, world
from training.shapes.judging import judge_prompts
from training.shapes.loop import fit
from training.shapes.pretraining import write_teacher
from training.shapes.swapped import contains_either, swap

GOOD, HETEROGENEOUS = "good", "heterogeneous"
TEACHERS = (GOOD, HETEROGENEOUS)
FIGURES = "figures.json"
CHECKED_NFE, CHECKED_PROMPTS, BATCH = 8, 168, 64


@dataclass(frozen=True)
class TeachersConfig:
    """``swapped`` is the share of the captions with a star or a heart whose words are exchanged; ``guidance`` is what
    is distilled. Both trainings start from the weights of ``start``.
    """

    start: str = "models/shapes-teacher"
    guidance: float = 2.5
    swapped: float = 0.6
    swap_steps: int = 800
    swap_lr: float = 5e-4
    distil_steps: int = 300
    distil_lr: float = 3e-4
    batch: int = 64
    seed: int = 311
    save_every: int = 50

    def shortened(self, steps: int) -> TeachersConfig:
        """The same with few steps, for a trial of the wiring."""
        return replace(self, swap_steps=steps, distil_steps=steps)


def make(folder: Path, config: TeachersConfig) -> dict[str, dict[str, float]]:
    """Make what ``folder`` does not hold yet (``good`` and ``heterogeneous``, diffusers pipelines), or resume.

    Returns the figures of both by the exact judge on validation prompts.
    """
    if not (folder / "config.json").exists() or any(not (folder / name).exists() for name in TEACHERS):
        claim(folder, config)
    for name in TEACHERS:
        if not (folder / name).exists():
            source = _swapped(folder, config) if name == HETEROGENEOUS else Path(config.start)
            _distilled(name, source, folder, config)
    kept = folder / FIGURES
    if not kept.exists():
        figures = {name: checked(folder / name) for name in TEACHERS}
        kept.write_text(json.dumps(figures, indent=2))
    found: dict[str, dict[str, float]] = json.loads(kept.read_text())
    return found


def _swapped(folder: Path, config: TeachersConfig) -> Path:
    """The teacher that has learnt the mixture, still guided by two calls."""
    done, run_dir = folder / "swapped", folder / "swapping"
    if done.exists():
        return done
    vae = AutoencoderTiny.from_pretrained(f"{config.start}/vae")
    vae.save_pretrained(run_dir / "autoencoder")
    parts = teacher.train(_flow_matching(config), run_dir)
    _write(parts, vae, done)
    shutil.rmtree(run_dir)
    return done


def _flow_matching(config: TeachersConfig) -> teacher.TeacherConfig:
    return teacher.TeacherConfig(
        steps=config.swap_steps,
        batch=config.batch,
        lr=config.swap_lr,
        start=config.start,
        swapped=config.swapped,
        seed=config.seed,
        save_every=config.save_every,
    )


def _distilled(name: str, source: Path, folder: Path, config: TeachersConfig) -> None:
    """The guided teacher of ``source`` as one network: v + (guidance - 1) (v - v_empty) in one call."""
    vae = AutoencoderTiny.from_pretrained(source / "vae").to(memory_format=torch.channels_last)
    guided, parts = (teacher.opened(str(source)) for _ in range(2))
    guided.modules().requires_grad_(False)
    parts.clip.requires_grad_(False)
    parts.t5.requires_grad_(False)
    scenes = _flow_matching(config)
    if name == GOOD:
        scenes = teacher.TeacherConfig(batch=config.batch, seed=config.seed)
    loss = distillation(guided, parts, teacher.LatentSource(vae, scenes), config)
    transformer = parts.transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), config.distil_lr, betas=(0.9, 0.98), weight_decay=0.0)
    fit(
        f"{name} teacher",
        folder / f"{name}.pt",
        transformer,
        optimizer,
        loss,
        lambda step: one_cycle(step, config.distil_steps, config.distil_lr),
        config.distil_steps,
        save_every=config.save_every,
        log_every=10,
    )
    _write(parts, vae, folder / name)
    (folder / f"{name}.pt").unlink(missing_ok=True)


def distillation(
    guided: teacher.Parts, parts: teacher.Parts, source: teacher.LatentSource, config: TeachersConfig
) -> Callable[[int], Tensor]:
    """The loss of a step: the mean squared difference to the guided velocity, at noisy pictures of the world."""
    tokenizer = vocabulary.tokenizer()
    empty_1L = torch.tensor(vocabulary.encode(tokenizer, [""]))

    def loss(step: int) -> Tensor:
        data_BSC, texts = source.batch(step)
        ids_BL = torch.tensor(vocabulary.encode(tokenizer, texts))
        gen = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        sigma_B = torch.rand(len(data_BSC), generator=gen)
        noise_BSC = torch.randn(data_BSC.shape, generator=gen)
        x_BSC = torch.lerp(data_BSC, noise_BSC, sigma_B[:, None, None])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                both = torch.cat([ids_BL, empty_1L.expand_as(ids_BL)])
                v_BSC, without_BSC = (
                    teacher.velocity(guided, torch.cat([x_BSC, x_BSC]), torch.cat([sigma_B, sigma_B]), both)
                    .float()
                    .chunk(2)
                )
            found_BSC = teacher.velocity(parts, x_BSC, sigma_B, ids_BL)
        return F.mse_loss(found_BSC.float(), without_BSC + config.guidance * (v_BSC - without_BSC))

    return loss


def _write(parts: teacher.Parts, vae: AutoencoderTiny, path: Path) -> None:
    """A whole pipeline, or none."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write_teacher(parts, vae, part)
    part.rename(path)


def checked(path: Path, guidance: float = 1.0) -> dict[str, float]:
    """What the exact judge says of a teacher's pictures of the validation prompts, one of each.

    ``right`` over all; ``right_swapped`` of the prompts with a star or a heart and ``right_others`` of the rest;
    ``exchanged`` is the share of the former that is right for the caption with the two words exchanged.
    """
    texts = prompts.measuring_prompts()[1][:CHECKED_PROMPTS]
    model = open_family(path, local_files_only=True, max_tokens=vocabulary.MAX_TOKENS)
    shape = model.latent_shape(world.SIDE_PX, world.SIDE_PX)
    console.print(f"checking {path} on {len(texts)} validation prompts")
    images = Sampler(model, model.sigmas(CHECKED_NFE, shape), guidance).draw(texts, range(len(texts)), shape, BATCH)
    right = np.array(judge_prompts(images, texts)["right"])
    exchanged = np.array(judge_prompts(images, [swap(text) for text in texts])["right"])
    either = np.array([contains_either(text) for text in texts])
    return {
        "right": float(right.mean()),
        "right_swapped": float(right[either].mean()),
        "right_others": float(right[~either].mean()),
        "exchanged": float(exchanged[either].mean()),
    }
