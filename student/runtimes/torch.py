"""The bundle's own pipeline as a runtime: serves a student as soon as it is trained or adopted.

Only this module and its imports need torch; ``load`` imports it on demand.
Legend: B images, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from student.bundle import Student
from student.families.family import Condition, Family, SizeError
from student.families.find import FAMILIES, family_of_student
from student.families.resized import resized
from student.noise import noise
from student.pipeline import open_pipeline, read_index
from student.runtimes.batches import Measured, measure, read_table, split, write_table
from student.runtimes.buckets import sizes_of
from student.runtimes.compiled import cpu_batch
from student.runtimes.lengths import Lengths, longest
from student.runtimes.machine import find_gpu, free_bytes
from student.runtimes.manifest import RUNTIMES
from student.runtimes.options import Options
from student.runtimes.placement import ACTIVATIONS, TRANSFORMERS, Placement, numbers_of, place
from student.runtimes.runtime import FloatArray, Watch, check_call
from student.runtimes.scoring import Scorers
from student.runtimes.sizes import Size, SizeRange, own_size, size_name
from student.sampler import denoise
from student.tokens import PromptTokens

DEFAULT = Options()
WHOLE = (slice(None),)
COMPILE = {"off": None, "on": "default", "graphs": "reduce-overhead"}
COMPILED_SHAPES = 64  # sizes times batches that a network is compiled for; torch's own limit is 8, and then it gives up


class TorchModel:
    """A family's parts as the placement says, from ids and noise to pictures; on any device, without files."""

    def __init__(self, family: Family, placement: Placement, compile: str = "off") -> None:
        self.family, self.placement = family, placement
        self._recorded = compile == "graphs"
        if mode := COMPILE[compile]:
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_SHAPES)
            for name, part in family.named_children():
                if name in TRANSFORMERS:
                    part.compile(mode=mode, dynamic=False)

    @torch.no_grad()
    def draw(
        self, ids_BL: Sequence[Tensor], x: Tensor, sigmas: Sequence[float], parts: Sequence[slice] = WHOLE,
        watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        """Pictures (B, ...) in [0, 1], float32, on the device; ``ids_BL`` and the noise ``x`` are in main memory.

        Each network is called for the ``parts`` of the rows one after another; ``watch`` as for ``draw_watched``.
        """
        conditions = [self.encode([ids[part] for ids in ids_BL]) for part in parts]
        start = x.to(self.placement.device)
        steps = torch.tensor(sigmas, dtype=torch.float32).to(start.device)  # in one copy, not one a step

        def velocity(x: Tensor, sigma: float) -> Tensor:
            step, rows = steps[sigmas.index(sigma)], zip(parts, conditions, strict=True)
            return _joined([self._velocity(x[part], step, condition, len(parts) > 1) for part, condition in rows])

        def on_step(i: int, sigma: float, x: Tensor, v: Tensor) -> None:
            if watch is not None and i < len(sigmas) - 1:
                watch(i, lambda rows: self._pictures(x - sigma * v, rows))

        x = denoise(velocity, start, sigmas, on_step)
        return _joined([self.family.decode(x[part]) for part in parts])

    def _pictures(self, x: Tensor, rows: Sequence[int]) -> FloatArray:
        """The pictures of these rows; for a video the first frame, which has its own latent frame."""
        x = x[:, :, :1] if x.ndim == 5 else x
        images: FloatArray = _joined([self.family.decode(x[row, None]) for row in rows]).cpu().numpy()
        return images

    def _velocity(self, x: Tensor, sigma: Tensor, condition: Condition, kept: bool) -> Tensor:
        """``kept``: the result must survive further calls, which a recorded network would overwrite it in."""
        if not self._recorded:
            return self.family.velocity(x, sigma, condition)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        v = self.family.velocity(x, sigma, condition)
        return v.clone() if kept else v

    def encode(self, ids_BL: Sequence[Tensor]) -> Condition:
        """Ids in main memory -> condition on the device."""
        device, offload = self.placement.device, self.placement.offload
        if offload == "cpu":
            return self.family.encode_ids(*ids_BL).to(device)
        there = [part.to(device) for part in ids_BL]
        return self.family.encode_ids(*there) if offload == "off" else self._encode_visiting(there)

    def _encode_visiting(self, ids_BL: Sequence[Tensor]) -> Condition:
        """The encoders' weights are copied to the device for this call; nothing is copied back."""
        text = _Encoding(self.family)
        visiting = {
            f"family.{name}.{key}": value.to(self.placement.device, non_blocking=True)
            for name in self.family.encoders
            if (encoder := getattr(self.family, name)) is not None
            for key, value in (*encoder.named_parameters(), *encoder.named_buffers())
        }
        condition: Condition = functional_call(text, visiting, tuple(ids_BL))
        return condition


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Encoding(nn.Module):
    """The encoders as a module, to be called with other weights."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, *ids_BL: Tensor) -> Condition:
        return self.family.encode_ids(*ids_BL)


class TorchRuntime:
    """On a GPU in the largest batches that do not change bytes, as measured once; image by image on a CPU. It is
    stepwise.

    Torch picks another matrix kernel for another batch size, which would change bytes.
    """

    name = "torch"

    def __init__(self, bundle: Path, student: Student, threads: int, options: Options = DEFAULT) -> None:
        torch.set_num_threads(threads)
        self.student = student
        self._tokens = PromptTokens(bundle, student.max_tokens, student.family)
        kind = FAMILIES[str(read_index(bundle)["_class_name"])]
        gpu = find_gpu()[0] if torch.cuda.is_available() else None
        activations = max(ACTIVATIONS, kind.decoder_bytes_px * student.image.height * student.image.width)
        free = _free_bytes()
        self.scorers = Scorers(bundle, student, threads, options.open_reward)  # first: what is left is measured below
        taken = max(0, free - _free_bytes())
        self.placement = place(numbers_of(bundle), gpu, options.offload, kind.in_float32, activations, taken)
        self._model = TorchModel(_open(bundle, student, self.placement, kind), self.placement, options.compile)
        self.sizes: tuple[Size, ...] = sizes_of(bundle, student)
        started = time.perf_counter()
        self.batches = self._measured(bundle, options)
        self.max_batch = self.batches[self.sizes[0]].largest if self.batches else cpu_batch(student)
        self.lengths = {} if student.image.frames is None else {size: self._lengths(size) for size in self.sizes}
        self.warm_up_s = time.perf_counter() - started

    @property
    def size_range(self) -> SizeRange | None:
        """The range of sizes that the model accepts beside ``sizes``, one picture at a time; None for videos."""
        return None if self.student.image.frames else SizeRange(*self._model.family.sides_px)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``Runtime.draw`` and ``VideoRuntime.draw``; every size that the family supports is accepted."""
        return self._drawn(prompts, seeds, steps, size, frames)

    def draw_watched(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``StepwiseRuntime.draw_watched``."""
        return self._drawn(prompts, seeds, steps, size, frames, watch)

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """See ``Runtime.score``."""
        return self.scorers.score(images_BCHW, prompts)

    def _drawn(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Size | None, frames: int | None,
        watch: Watch | None = None,
    ) -> FloatArray:  # fmt: skip
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        size = size or own_size(self.student)
        together = self.batches[size].together if size in self.batches else (1,)
        parts = split(len(prompts), together)
        images_BCHW: FloatArray = self._draw(self._at(size, frames), prompts, seeds, steps, parts, watch).numpy()
        return images_BCHW

    def _at(self, size: Size, frames: int | None = None) -> Student:
        own = self.student.image.frames
        frames = frames or own
        if size == own_size(self.student) and frames == own:
            return self.student
        try:
            return resized(self._model.family, self.student, size, frames)
        except SizeError as error:
            raise ValueError(f"{self.student.id} does not support {size_name(size)}: {error}") from error

    def _draw(
        self, student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int,
        parts: Sequence[slice] = WHOLE, watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        ids_BL = [torch.from_numpy(rows) for rows in self._tokens.encode(prompts)]
        x = torch.from_numpy(noise(seeds, student.latents.shape))
        return self._model.draw(ids_BL, x, student.sigmas[steps], parts, watch).cpu()

    def _lengths(self, size: Size) -> Lengths:
        """Lengths that the autoencoder can divide and that fit in memory; its own at its own size in any case."""
        step, fixed_bytes, frame_bytes = self._model.family.video_memory(*size)
        own = (self.student.image.frames or 1) if size == own_size(self.student) else 1
        most = longest(_room_bytes(self.placement.device), fixed_bytes, frame_bytes, step)
        return Lengths(1, max(own, most), step)

    def _measured(self, bundle: Path, options: Options) -> dict[Size, Measured]:
        """The cost of each size's batches on this GPU, from the bundle or measured now; empty on a CPU."""
        if self.placement.device == "cpu" or cpu_batch(self.student) == 1:
            return {}
        key = _key(self.student, self.placement, options)
        table = read_table(bundle / RUNTIMES, key)
        steps = min(self.student.steps)
        for size in self.sizes:
            if size_name(size) not in table:
                student = self._at(size)
                table[size_name(size)] = measure(
                    lambda prompts, seeds, student=student: self._draw(student, prompts, seeds, steps).numpy(),  # type: ignore[misc]
                    _out_of_memory,
                )
                write_table(bundle / RUNTIMES, key, table)
        self._draw(self.student, ["a"], [0], steps)  # a kept table warms nothing up
        return {size: table[size_name(size)] for size in self.sizes}


def _open(bundle: Path, student: Student, placement: Placement, kind: type[Family]) -> Family:
    dtype = getattr(torch, placement.dtype)
    float32 = {*kind.in_float32, *(("vae",) if dtype == torch.float16 else ())}
    types = {"default": dtype, **dict.fromkeys(float32, torch.float32)}
    family = family_of_student(open_pipeline(bundle, types if float32 else dtype), student)
    move_parts(family, placement)
    return family


def move_parts(family: Family, placement: Placement) -> None:
    """Move each part as the placement says; encoders that are copied for each call wait in pinned memory."""
    for name, part in family.named_children():
        if name in family.encoders and placement.offload != "off":
            if placement.offload == "encoders" and torch.cuda.is_available():
                for value in (*part.parameters(), *part.buffers()):
                    value.data = value.data.pin_memory()
        else:
            part.to(placement.device)


def _key(student: Student, placement: Placement, options: Options) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    parts = (gpu, torch.__version__, placement.dtype, placement.offload, options.compile, student.fingerprint()[:16])
    return " ".join(map(str, parts))


def _free_bytes() -> int:
    """Of the GPU's memory; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _room_bytes(device: str) -> int | None:
    """The memory that is available beside the weights, in bytes."""
    if device == "cpu":
        return free_bytes()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError)
