"""The three roles of one network in a RATS run: the student, its slow copy (the teacher), and its frozen start.

With full fine-tuning each role has weights of its own. With LoRA the student and the teacher are two adapters (peft) on
one base, and the start is the base alone, so that nothing is stored twice. Over several processes each network may be
sharded (training/sharding.py); whole tensors go in and out.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from student.base import NETWORKS, adapter_folder
from student.families.family import Family
from student.families.two_experts import networks
from training import offload
from training.decoder import decode_tiles, recompute_blocks
from training.processes import Processes
from training.rats.adapters import Lora, add_adapters, equalise, pairs, switch, write_adapter
from training.rats.config import RatsConfig
from training.sharding import calls, clone, gathered, reduce_gradients, shard, shard_like, without_weights

ROLES = ("student", "teacher", "start")


@dataclass(frozen=True)
class Sharding:
    """In which type slices come together; ``frugal`` gathers for each call and reduces after each, which takes no room
    for whole weights and gradients.
    """

    in_bf16: bool = False
    frugal: bool = False


class Roles:
    """One family's transformer in its three roles; ``model.transformer`` is the student outside of ``role``.

    ``trainable`` are the student's parameters that learn: those of its ``learning`` networks, which of two experts are
    the ones that its steps call. The student, and the average of it, begin as ``begin`` where that is given; the start
    is then the family's own transformer, apart. The start only generates, so it may have another type (``start_in``).
    """

    def __init__(
        self,
        model: Any,
        ema: float,
        lora: Lora | None = None,
        processes: int = 1,
        compile_with: str = "",
        sharding: Sharding = Sharding(),
        begin: Any = None,
        learning: Collection[str] = NETWORKS,
        start_in: torch.dtype | None = None,
    ) -> None:
        self.model, self.lora, self._learning = model, lora, learning
        self._ema, self.sharded, self._frugal, self._reduce = ema, processes > 1, sharding.frugal, True
        start = model.transformer.requires_grad_(False)
        if start_in is not None and begin is not None:
            nn.Module.to(start, start_in)  # diffusers' own warns of what no transformer here has
        base = model.transformer = start if begin is None else begin.requires_grad_(False)
        if lora is not None:
            add_adapters(self._parts(base), lora)
            equalise(self._parts(base))
        for network in {id(one): one for one in (base, start)}.values() if self.sharded else ():
            shard(network, processes, sharding.in_bf16)  # before any is copied: none is ever whole in a process
        self._student = self._teacher = base
        self._start = start
        if lora is None:
            self._teacher = clone(base, processes, sharding.in_bf16)
            self._start = start if begin is not None else clone(base, processes, sharding.in_bf16, start_in)
            self.trainable, self._following = self._parameters(self._student), self._parameters(self._teacher)
            for parameter in self.trainable:
                parameter.requires_grad_(True)
        else:
            self.trainable, self._following = pairs(base)
        if compile_with:
            for network in {id(one): one for one in (self._student, self._teacher, self._start)}.values():
                for part in networks(network).values():
                    part.compile_repeated_blocks(backend=compile_with)

    @classmethod
    def of(cls, config: RatsConfig, model: Family, begin: Any = None, learning: Collection[str] = NETWORKS) -> Roles:
        """Those of a run: adapters, checkpointing, tiles and sharding as the configuration says."""
        compute = config.compute
        if compute.checkpointing:
            for part in networks(model.transformer if begin is None else begin).values():
                part.enable_gradient_checkpointing()
            recompute_blocks(model.vae)
        decode_tiles(model.vae, compute.tile_px)
        lora = Lora(config.lora.rank, config.lora.alpha, config.seed) if config.lora.rank else None
        processes = Processes().size if compute.shard else 1
        sharding = Sharding(compute.precision == "bf16", compute.shard_frugal)
        start_in = torch.bfloat16 if config.teacher.weights == "bf16" else None
        return cls(model, config.teacher.ema, lora, processes, compute.compile, sharding, begin, learning, start_in)

    @property
    def alike(self) -> bool:
        """Whether every process has gradients of the same parameters: of two experts each may call its own."""
        return len(self._parts(self._student)) == 1

    @contextmanager
    def role(self, name: str) -> Iterator[Any]:
        """The family with its transformer in the role ``name``; only the student has gradients."""
        assert name in ROLES
        with torch.set_grad_enabled(name == "student" and torch.is_grad_enabled()):
            self._switch(name)
            try:
                with self.rollouts() if name != "student" else nullcontext():
                    yield self.model
            finally:
                self._switch("student")

    @contextmanager
    def rollouts(self) -> Iterator[None]:
        """While calls follow each other without gradient: what is sharded comes together once for them all."""
        with calls(self.model.transformer, not self._frugal) if self.sharded else nullcontext():
            yield

    def reduce(self, wanted: bool) -> None:
        """Whether the coming micro-batch is a step's last, after which gradients are averaged over the processes."""
        self._reduce = wanted

    @contextmanager
    def backward(self, last: bool = True) -> Iterator[None]:
        """Around each backward call of a micro-batch; the ``last`` of a step's last one averages the gradients."""
        if self.sharded and not self._frugal:
            reduce_gradients(self._student, self._reduce and last)
        yield

    @contextmanager
    def using(self, transformer: nn.Module) -> Iterator[Any]:
        """The family with a transformer that has none of the roles (a critic)."""
        student, self.model.transformer = self.model.transformer, transformer
        try:
            yield self.model
        finally:
            self.model.transformer = student

    def follow(self) -> None:
        """Move the teacher a little towards the student: it is itself the exponential average, in fp32."""
        with torch.no_grad():
            for slow, fast in zip(self._following, self.trainable, strict=True):
                slow.sub_((slow - fast).mul_(1 - self._ema))

    def restart_teacher(self) -> None:
        """Set the teacher to the student as it is now."""
        with torch.no_grad():
            for slow, fast in zip(self._following, self.trainable, strict=True):
                slow.copy_(fast)

    def offload_start(self) -> None:
        """Move the frozen start to main memory until it is needed again; with LoRA or sharding it stays where it is."""
        if self._start is not self._student and not self.sharded:
            self._start.to("cpu")

    def close(self) -> None:
        """At the end: drop every network, so that its memory is free for what is opened next."""
        self._student = self._teacher = self._start = self.model.transformer = None
        self.trainable, self._following = [], []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def gather(self, keep: bool) -> None:
        """At the end: gather a sharded student in the process that keeps it; every process must call this."""
        if not self.sharded:
            return
        state = gathered(self._student.state_dict(), keep)
        if keep:
            self._student = without_weights(self._student)
            if self.lora:
                add_adapters(self._parts(self._student), self.lora)
            self._student.load_state_dict(state, assign=True)
            self.model.transformer = self._student
            self.trainable = []

    def dequantise(self, transformer: Any) -> None:
        """At the end: put what the adapters of a quantised base have learnt on the same base in full."""
        assert self.lora is not None
        state = self.student_state()
        self._student = self.model.transformer = transformer.requires_grad_(False)
        add_adapters(self._parts(transformer), self.lora)
        equalise(self._parts(transformer))
        self.trainable, self._following = pairs(transformer)
        self.load_student(state)

    def write_adapter(self, adapter: Path, pipeline: Any) -> None:
        """At the end: write a LoRA student's adapter to the folder ``adapter``, a second expert's to one inside it."""
        if self.lora is not None:
            self._switch("student")
            for name, part in self._parts_by_name(self._student).items():
                write_adapter(adapter_folder(adapter, name), part, self.lora, pipeline)

    def merge(self, adapter: Path, pipeline: Any) -> None:
        """At the end: ``write_adapter``, and merge it into its base."""
        self.write_adapter(adapter, pipeline)
        for part in self._parts(self._student) if self.lora is not None else ():
            part.fuse_lora(adapter_names=["student"])
            part.unload_lora()

    def student_state(self) -> dict[str, Tensor]:
        """The student's trained weights by parameter name, in main memory; this process's part of a sharded student."""
        learns = {id(p) for p in self.trainable}
        return {name: _kept(p) for name, p in self._student.named_parameters() if id(p) in learns}

    def load_student(self, state: dict[str, Tensor]) -> None:
        """Load weights that ``student_state`` returned, or whole ones, into the student."""
        named = dict(self._student.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                named[name].copy_(shard_like(value, named[name]))

    def live(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves, of student and teacher, for a checkpoint that is written and read slice by slice."""
        learns = {id(p) for p in self.trainable}
        student = {name: p.detach() for name, p in self._student.named_parameters() if id(p) in learns}
        return {"student": student, "teacher": {str(i): p.detach() for i, p in enumerate(self._following)}}

    def state(self) -> dict[str, Any]:
        """Student and teacher for a checkpoint; this process's part where they are sharded."""
        return {"student": self.student_state(), "teacher": [_kept(p) for p in self._following]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned, sharded or whole."""
        self.load_student(state["student"])
        with torch.no_grad():
            for value, like in zip(state["teacher"], self._following, strict=True):
                like.copy_(shard_like(value, like))

    def _switch(self, name: str) -> None:
        apart = self._start is not self._student
        if name == "start" and apart and not self.sharded:
            self._start.to(next(self._student.parameters()).device)
        self.model.transformer = getattr(self, f"_{name}")
        if self.lora is None or (name == "start" and apart):
            return
        switch(self._parts(self._student), name)
        if name != "start":
            for parameter in self.trainable:  # peft switches the gradient of an adapter off with the adapter
                parameter.requires_grad_(True)

    def _parts_by_name(self, network: Any) -> dict[str, Any]:
        """The transformers of a network that learn."""
        return {name: part for name, part in networks(network).items() if name in self._learning}

    def _parts(self, network: Any) -> list[Any]:
        return list(self._parts_by_name(network).values())

    def _parameters(self, network: Any) -> list[nn.Parameter]:
        return [parameter for part in self._parts(network) for parameter in part.parameters()]


def _kept(parameter: nn.Parameter) -> Tensor:
    """A copy in main memory; of a sharded parameter of this process's slice."""
    return parameter.detach().to(offload.MAIN_MEMORY, copy=True)
