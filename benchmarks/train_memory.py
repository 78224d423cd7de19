"""``python -m benchmarks.train_memory``: what a training step holds on a GPU, part by part, at full published size.

The step is the trainer's own, over networks of the published sizes whose tensors have shapes and no memory
(benchmarks/make_believe.py): transformer, adapters, autoencoder, a reward of HPS v2.1's size, AdamW, the average.
Every allocation is counted while it lives; what a driver, CUDA's libraries and a fragmented heap take is not, of which
a GPU needs a gigabyte or two more. With ``--write`` the figures go into training/experiment/memory_gb.json, of which
docs/cost.md has its table; names of presets choose rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.by_sigma import by_sigma
from benchmarks.full_size import MODELS, condition, hps, image_reward, without_weights
from benchmarks.make_believe import DEVICE, Peak, fake_device, num_bytes, put, unread
from benchmarks.memory_figures import Row, keep, line
from benchmarks.nf4 import to_nf4
from rewards.twostage import TwoStage
from rewards.weighted import Term
from student.families.family import Family
from student.families.two_experts import joined, networks
from training import offload, sharding
from training.config import changed
from training.experiment.presets import preset
from training.experiment.setup import DTYPES
from training.rats import roles, trainer
from training.rats.config import RatsConfig
from training.rats.method import Batch
from training.rats.roles import Lora, Roles, Sharding
from training.sampler import Sampler
from training.timing import StepTimer

GB = 1e9
INNER = ("decode", "reward")  # parts of others
COUNTED_NFE = 2  # of teacher and student; what every step more keeps, its state and velocity, is added


@dataclass(frozen=True)
class Case:
    """One row: a preset, what is changed of it, over how many processes, and the most that it may take (GB)."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    limit_gb: float | None = None


NF4 = {"compute.quantise": "nf4"}
TILES = {"compute.tile_px": 256}
OFFLOAD = {"optim.state": "offload"}
ALL = {"lora.rank": 0, "compute.weights": "fp32"}
FULL = {**ALL, "compute.shard": True, "compute.shard_frugal": True}
CASES = (
    Case("FLUX.1-dev, LoRA", "flux-dev", limit_gb=45),
    Case("FLUX.1-dev, LoRA, gradient through all steps", "flux-dev", {"gradient.mode": "full"}),
    Case("FLUX.1-dev, LoRA on another model's weights", "flux-dev", {"student.init": "another"}),
    Case("FLUX.1-dev, LoRA on nf4", "flux-dev", NF4, limit_gb=23),
    Case("FLUX.1-dev, LoRA on nf4, tiles of 256 px", "flux-dev", {**NF4, **TILES}),
    Case("FLUX.1-dev, all weights, 8 GPUs", "flux-dev", FULL, 8, 80),
    Case("FLUX.1-dev, all weights, optimizer offloaded, 8 GPUs", "flux-dev", {**FULL, **OFFLOAD}, 8, 80),
    Case("FLUX.1-dev, all weights, optimizer offloaded, 4 GPUs", "flux-dev", {**FULL, **OFFLOAD}, 4, 80),
    Case("Stable Diffusion 3.5 medium, LoRA", "sd35-medium", limit_gb=16),
    Case("Stable Diffusion 3.5 medium, all weights, optimizer offloaded", "sd35-medium", {**ALL, **OFFLOAD}),
    Case("Wan 2.1 1.3B, LoRA", "wan-1.3b", limit_gb=23),
    Case("FLUX.2 klein 4B, LoRA", "flux2-klein"),
    Case("Z-Image-Turbo, LoRA", "z-image-turbo"),
    Case("Z-Image-Turbo, LoRA on nf4", "z-image-turbo", NF4),
    Case("Qwen-Image, LoRA", "qwen-image"),
    Case("Qwen-Image, LoRA on nf4", "qwen-image", NF4),
    Case("Wan 2.2 5B, LoRA", "wan-2.2-5b"),
    Case("Wan 2.2 5B, LoRA, tiles of 256 px", "wan-2.2-5b", TILES),
    Case("Wan 2.2 14B, LoRA", "wan-14b"),
    Case("Wan 2.2 14B, LoRA on nf4", "wan-14b", NF4),
)


def measure(case: Case) -> Row:
    """One step of the case after the optimizer has its state, and a validation's pictures."""
    config = changed(preset(case.preset), dict(case.settings))
    joint = max(2, config.teacher.batch // config.optim.batch)
    # Through all steps a gradient needs what every one of them keeps.
    student_nfe = max(config.student.nfe) if config.gradient.mode == "full" else COUNTED_NFE
    steps = {"teacher.nfe": COUNTED_NFE, "student.nfe": (student_nfe,), "optim.accumulate": joint}
    counted = changed(config, {**steps, "teacher.guided_steps": min(1, config.teacher.guided_steps)})
    device = DEVICE if case.processes == 1 else "cpu"  # FSDP knows no make-believe device
    with divided(case.processes), fake_device() as mode, unread(), by_sigma(), Peak(device) as peak:
        model = opened(case.preset, counted, mode, device)
        reward = _placed(hps(), counted, mode, device)
        for network in (model, reward):
            peak.hold(network)
        running = _trainer(case, counted, model, reward, mode)
        peak.hold(running.roles._student)
        weights = num_bytes(model.vae) + num_bytes(reward) + _base_bytes(running.roles, counted)
        found = _parts(running, peak)
        latent = 4 * torch.Size(running.latent_shape).numel()
        found["teacher"] += 2 * (config.teacher.nfe - COUNTED_NFE) * latent * max(1, config.teacher.batch)
        more = 2 * (max(config.student.nfe) - student_nfe) * latent
        found |= {name: found[name] + more for name in ("student", "backward")}
        held = {"weights": weights, "learnt": peak.now - weights}
        heldout = _placed(image_reward(), counted, mode, device)
        peak.hold(heldout)
        found["validation"] = _measured(counted, running, (reward, heldout), peak)
    gb = {name: round(value / GB, 2) for name, value in found.items()}
    in_gb = {name: round(value / GB, 2) for name, value in held.items()}
    return Row(case.name, case.preset, dict(case.settings), case.processes, case.limit_gb, in_gb, gb)


@contextlib.contextmanager
def divided(processes: int) -> Iterator[None]:
    """The first of so many processes, whose others are not there; sharded networks are copied without weights.

    The optimizer takes all parameters at once, as it does on a GPU, and what DTensor runs to learn the shape of a
    result is not counted. The CPU stands for the GPU, and so the make-believe device for main memory.
    """
    if processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    mesh = init_device_mesh("cpu", (processes,))
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached

    def apart(*arguments: Any) -> Any:
        with _disable_current_modes():
            return shapes(*arguments)

    with (
        patch.object(sharding, "init_device_mesh", lambda *_: mesh),
        patch.object(offload, "MAIN_MEMORY", DEVICE),
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", apart),
    ):
        yield


def opened(name: str, config: RatsConfig, mode: FakeTensorMode, device: str = DEVICE) -> Family:
    """The preset's family on the make-believe device, in the types of a run, with prompts that are encoded already."""
    model = joined(without_weights(MODELS[name]))
    put(model.transformer, mode, DTYPES[config.compute.weights], device)
    for part in networks(model.transformer).values() if config.compute.quantise == "nf4" else ():
        to_nf4(part, mode)
    put(model.vae, mode, torch.float32 if "vae" in model.in_float32 else DTYPES[config.compute.weights], device)
    model.encode = lambda prompts: condition(MODELS[name], prompts, model.device)  # type: ignore[method-assign]
    return model


def _placed(reward: TwoStage, config: RatsConfig, mode: FakeTensorMode, device: str) -> TwoStage:
    put(reward, mode, DTYPES[config.reward.weights], device)
    return reward


def _trainer(case: Case, config: RatsConfig, model: Family, reward: TwoStage, mode: FakeTensorMode) -> Any:
    return trainer.Trainer(
        config,
        _roles(case, config, model, mode),
        Path(os.devnull),
        prompts=lambda step, num: ["a prompt"] * num,
        reward=partial(_score, reward),
        validate=lambda samplers, step: {},
        latent_shape=model.latent_shape(config.image.height_px, config.image.width_px, config.image.frames),
    )


def _score(reward: TwoStage, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """As ``rewards.weighted.Term`` scores pictures, and videos frame by frame."""
    return Term("counted", reward).raw(images, prompts)


def _roles(case: Case, config: RatsConfig, model: Family, mode: FakeTensorMode) -> Roles:
    if case.processes == 1:
        begin = opened(case.preset, config, mode).transformer if config.student.init else None
        return Roles.of(config, model, begin)

    def clone(network: Any, processes: int, in_bf16: bool = False, dtype: torch.dtype | None = None) -> Any:
        other = joined(without_weights(MODELS[case.preset])).transformer
        put(other, mode, dtype or DTYPES[config.compute.weights], "cpu")
        sharding.shard(other, processes, in_bf16)
        return other

    for part in (*networks(model.transformer).values(), model.vae):
        part.enable_gradient_checkpointing()
    lora = Lora(config.lora.rank, config.lora.alpha) if config.lora.rank else None
    spread = Sharding(config.compute.precision == "bf16", config.compute.shard_frugal)
    with patch.object(roles, "clone", clone):
        return Roles(model, config.teacher.ema, lora, case.processes, "", spread)


def _base_bytes(networks: Roles, config: RatsConfig) -> int:
    """The frozen base under adapters, and a start apart from it; where all weights are trained there is none."""
    if not config.lora.rank:
        return 0
    learnt = sum(p.numel() * p.element_size() for p in (*networks.trainable, *networks._following))
    start = num_bytes(networks._start) if config.student.init else 0
    return num_bytes(networks.model.transformer) - learnt + start


class _PartPeaks(StepTimer):
    """In place of the trainer's clock: the peak of each part."""

    peak: Peak
    found: dict[str, int]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name in INNER:
            yield
            return
        self.peak.restart()
        yield
        self.found[name] = max(self.found.get(name, 0), self.peak.most)

    def seconds(self) -> dict[str, float]:
        return {}


def _parts(running: Any, peak: Peak) -> dict[str, int]:
    """The peak of each part of a step over two micro-batches."""

    class Peaks(_PartPeaks):
        found: dict[str, int] = {}

    Peaks.peak = peak
    for parameter in running.roles.trainable:
        parameter.grad = torch.zeros_like(parameter)
    running.optimizer.step()
    teach: Callable[[Sequence[Batch]], list[Batch]] = running.method.teach
    taught: list[Batch] = []

    def first_two(batches: Sequence[Batch]) -> list[Batch]:
        taught[:] = teach(batches)  # all of them lie there while each is learned from
        return taught[:2]

    with patch.object(trainer, "StepTimer", Peaks), patch.object(running.method, "teach", first_two):
        running._step(0)
    taught.clear()
    running.optimizer.zero_grad()
    return Peaks.found


def _measured(config: RatsConfig, running: Any, rewards: Sequence[TwoStage], peak: Peak) -> int:
    """A validation's pictures, drawn in one step, and their scores by both rewards."""
    model, num = running.roles.model, config.validation.batch
    sampler, prompts = Sampler(model, (1.0,), precision=config.compute.precision), ["a prompt"] * num
    peak.restart()
    with running.roles.rollouts(), torch.no_grad():
        images = sampler.draw(prompts, range(num), running.latent_shape, num)
        with sampler.autocast():
            for reward in rewards:
                _score(reward, images.to(model.device), prompts)
    return peak.most


def counted(case: Case) -> Row:
    """``measure`` in a process of its own, which ends without torch's thread for a device that has no driver."""
    command = [sys.executable, "-m", "benchmarks.train_memory", "--one", str(CASES.index(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip().splitlines()[-1:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Count every row, or those of the presets that are named."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--one"]:
        row = measure(CASES[int(arguments[1])])
        print(json.dumps(asdict(row)), flush=True)
        os._exit(0)
    wanted = [name for name in arguments if name != "--write"]
    for case in CASES:
        if not wanted or case.preset in wanted:
            row = counted(case)
            print(line(row), flush=True)
            if "--write" in arguments:
                keep(row, [one.name for one in CASES])


if __name__ == "__main__":
    main()
