"""One optimizer step of the trainer, over a small FLUX on a make-believe device, whose calls are counted.

It is the first of several processes whose others are not there. Counted are calls of the transformer, collectives, and
the places where the host waits until the device has done all that it was given: figures that are read, and copies that
block. ``naive`` undoes every saving of the trainer (benchmarks/step_counts.py says which).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel

from benchmarks.full_size import Model, condition, without_weights
from benchmarks.make_believe import DEVICE, fake_device, put, unread
from benchmarks.step_counts import KINDS, PROCESSES
from benchmarks.train_memory import divided
from benchmarks.train_step import NARROW, VISION, words
from rewards import preprocess, twostage
from rewards.clip import ClipReward
from student.families import family as families
from student.families.family import Condition, Family
from student.families.flux import Flux
from training import sampler, sharding
from training.config import changed
from training.experiment.setup import DTYPES
from training.processes import Processes, state
from training.rats import roles, trainer
from training.rats.config import RatsConfig
from training.rats.roles import Lora, Roles, Sharding
from training.rundir import RunStopped
from training.timing import StepTimer

DOUBLE, SINGLE = 1, 2  # blocks of the stand-in


class Counted(TorchDispatchMode):
    """Collectives, and copies between main memory and the device for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again with its slices
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.found["collectives"] += 1
        elif func is torch.ops.aten._to_copy.default:
            self._copied(args[0], out, kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self._copied(args[1], args[0], kwargs.get("non_blocking", False) or True in args[2:])
        return out

    def _copied(self, value: Tensor, to: Tensor, in_passing: bool) -> None:
        self.found["waits"] += value.device.type != to.device.type and not in_passing

    @contextlib.contextmanager
    def reads(self) -> Iterator[None]:
        """Count what the host reads of the device."""
        names = ("item", "__float__", "__int__", "__bool__", "tolist", "numpy")
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(patch.object(Tensor, name, self._reading(getattr(Tensor, name))))
            whole = self._reading(lambda value: [1.0] * len(value))
            stack.enter_context(patch.object(FakeTensor, "tolist", whole))  # its own reads one after the other
            yield

    def _reading(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(value: Tensor, *arguments: Any) -> Any:
            self.found["waits"] += value.device.type == DEVICE
            return read(value, *arguments)

        return counted


class Parts(StepTimer):
    """In place of the trainer's clock: which part of a step a call belongs to."""

    now = "student"
    waits: Counter[str]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See StepTimer."""
        before, Parts.now = Parts.now, name
        yield
        Parts.now = before

    def seconds(self) -> dict[str, float]:
        """The one place where a clock of CUDA events waits."""
        Parts.waits["waits"] += 1
        return {}


def stand_in(guided: bool) -> Model:
    """A FLUX of a few blocks; ``guided`` by two calls, else by an input."""
    transformer = {"num_layers": DOUBLE, "num_single_layers": SINGLE, "num_attention_heads": 2}
    widths = {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32, "in_channels": 16}
    more: dict[str, Any] = {**transformer, **widths, "pooled_projection_dim": 16}
    return Model(
        Flux,
        lambda: FluxTransformer2DModel(guidance_embeds=not guided, **more),
        lambda: AutoencoderKL(block_out_channels=(32,), latent_channels=4, scaling_factor=0.36, shift_factor=0.12),
        (8, 32),
        16,
        cell_px=1,
    )


def count(config: RatsConfig, guided: bool, naive: bool = False) -> dict[str, int]:
    """What the second step of a run takes; ``guided``: by two calls, not by an input of the network."""
    config = changed(config, {"image.height_px": 16, "image.width_px": 16})
    model, device = stand_in(guided), DEVICE
    if config.compute.shard:
        device = "cpu"  # FSDP knows no make-believe device
    with _environment(), divided(PROCESSES), fake_device() as mode, unread(), _naive(naive):
        state().device = torch.device(device)
        counted = Counted()
        running = _trainer(config, model, mode, device)
        with patch.object(trainer, "StepTimer", Parts), _calls(counted):
            Parts.waits = Counter()
            running._step(0)
            counted.found.clear()
            Parts.waits = counted.found
            with counted, counted.reads(), contextlib.suppress(RunStopped):
                running._train(1, _asked())
    torch.distributed.destroy_process_group()
    PartialState._reset_state()
    return {kind: counted.found[kind] for kind in KINDS if kind != "waits" or device == DEVICE}


def _asked() -> threading.Event:
    """A run that is asked to stop makes one step."""
    event = threading.Event()
    event.set()
    return event


def _environment() -> Any:
    """What accelerate reads of its place among the processes."""
    place = {"WORLD_SIZE": str(PROCESSES), "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(PROCESSES)}
    return patch.dict(os.environ, {**place, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def _calls(counted: Counted) -> Iterator[None]:
    """Count the calls of the transformer by the part of the step: those of the backward pass are run again."""
    velocity = Family.velocity

    def called(self: Family, *arguments: Any) -> Tensor:
        counted.found["again" if Parts.now == "backward" else Parts.now] += 1
        return velocity(self, *arguments)

    with patch.object(Family, "velocity", called):
        yield


def _trainer(config: RatsConfig, model: Model, mode: FakeTensorMode, device: str) -> Any:
    family = without_weights(model)
    for part, dtype in ((family.transformer, config.compute.weights), (family.vae, "fp32")):
        put(part, mode, DTYPES[dtype], device)
    here = torch.device("cpu")
    family.encode = lambda prompts: condition(model, prompts, here).to(device)  # type: ignore[method-assign]
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={**VISION, **NARROW}, text_config=NARROW, projection_dim=64))
    put(clip, mode, torch.float32, device)
    with patch.object(
        roles, "clone", lambda network, num, in_bf16=False, dtype=None: _clone(model, mode, config, num, in_bf16)
    ):
        found = trainer.Trainer(
            config,
            Roles.of(config, family) if not config.compute.shard else _sharded(config, family),
            Path(os.devnull),
            prompts=lambda step, num: ["a prompt"] * num,
            reward=ClipReward(clip, words).score,
            validate=lambda samplers, step: {"heldout_validation": 0.0},
            latent_shape=family.latent_shape(config.image.height_px, config.image.width_px),
        )
    found._save = lambda *_, **__: None  # type: ignore[method-assign]
    return found


def _sharded(config: RatsConfig, family: Family) -> Roles:
    lora = Lora(config.lora.rank, config.lora.alpha) if config.lora.rank else None
    return Roles(family, config.teacher.ema, lora, PROCESSES, "", Sharding(True, config.compute.shard_frugal))


def _clone(model: Model, mode: FakeTensorMode, config: RatsConfig, processes: int, in_bf16: bool) -> Any:
    other = without_weights(model).transformer
    put(other, mode, DTYPES[config.compute.weights], "cpu")
    sharding.shard(other, processes, in_bf16)
    return other


@contextlib.contextmanager
def _naive(wanted: bool) -> Iterator[None]:
    """Every saving of the trainer undone."""
    if not wanted:
        yield
        return
    with contextlib.ExitStack() as stack:

        def instead(place: Any, name: str, other: Any) -> None:
            stack.enter_context(patch.object(place, name, other))

        for place in (families, preprocess, twostage, trainer):
            instead(place, "sent", lambda value, device: value if device is None else value.to(device))
        instead(sampler, "velocity_of", _guided_by_two)
        instead(trainer, "means", _each_read)
        instead(trainer.Rats, "teach", lambda self, batches: [self._taught(batch) for batch in batches])
        instead(Roles, "reduce", _reduce_now)
        instead(Roles, "rollouts", _call_by_call)
        instead(Processes, "mean_gradients", _one_by_one)
        yield


@contextlib.contextmanager
def _call_by_call(self: Roles) -> Iterator[None]:
    """Slices come together for every call."""
    with sharding.calls(self.model.transformer, False) if self.sharded else contextlib.nullcontext():
        yield


def _guided_by_two(model: Family, condition: Condition, empty: Any = None, guidance: float = 1.0) -> sampler.Velocity:
    def velocity(x: Tensor, sigma: float) -> Tensor:
        v = model.velocity(x, sigma, condition).float()
        if guidance == 1.0:
            return v
        return model.guided(v, model.velocity(x, sigma, empty).float(), guidance)

    return velocity


def _each_read(rows: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    read = [{name: float(value) for name, value in row.items()} for row in rows]
    return {name: sum(row[name] for row in read) / len(read) for name in read[0]}


def _reduce_now(self: Roles, _: bool) -> None:
    """Before every micro-batch the gradients of the one before are averaged; FSDP does it in every backward call."""
    self._reduce = True
    _one_by_one(Processes(), self.trainable, 1)


def _one_by_one(self: Processes, parameters: Sequence[Tensor], *_: Any, **__: Any) -> None:
    for parameter in parameters:
        if parameter.grad is not None and not hasattr(parameter, "placements"):
            torch.distributed.all_reduce(parameter.grad)
