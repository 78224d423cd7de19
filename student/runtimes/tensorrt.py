"""A student in TensorRT or TensorRT-RTX: the steps as one CUDA graph, or one by one where they are watched.

Latents, text and pictures stay on the device from the token ids to the finished picture, watched or not.
Legend: B images, C latent channels, H x W latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from student.bundle import BundleError, Student
from student.noise import noise
from student.runtimes.batches import split
from student.runtimes.buckets import Bucket, files_of, in_buckets
from student.runtimes.compiled import CompiledRuntime, SteppedRuntime, checked_manifest, stages_in_torch
from student.runtimes.engine import Cuda, Device, Engine, EngineSession, Run
from student.runtimes.experts import STEPS, step_stage
from student.runtimes.machine import find_gpu, library_version
from student.runtimes.manifest import DECODER, RUNTIMES, TEXT, RuntimeManifest
from student.runtimes.runtime import FloatArray, Watch
from student.runtimes.session import Session
from student.runtimes.stages import StagedGraphs
from student.sampler import denoise


def open_engine(path: Path, library: str) -> EngineSession:
    """Open a plan with its own working memory.

    Raises:
        BundleError: there is no GPU, or the plan is not for it.
    """
    device = open_device(library)
    engine = Engine(path, library, device)
    engine.share(torch.empty(max(engine.scratch_bytes, 1), dtype=torch.uint8, device=device.name))
    return EngineSession(engine, device)


@dataclass(frozen=True)
class _Recorded:
    """Text, loop and decoder recorded as one, with the tensors that the recording reads and writes."""

    replay: Run
    noise: Tensor
    images: Tensor


class EngineGraphs(StagedGraphs):
    """The engines with one working memory and one stream; a recording for each batch size and step count."""

    def __init__(
        self, bundle: Path, student: Student, files: Mapping[str, Path], library: str, device: Device | None = None,
        boundary: float | None = None,
    ) -> None:  # fmt: skip
        self._device = device or open_device(library)

        def open_(path: Path) -> EngineSession:
            return EngineSession(Engine(path, library, self._device), self._device)

        super().__init__(bundle, student, files, open_, boundary=boundary)
        self._engines: dict[str, Engine] = {stage: self._sessions[stage].engine for stage in self.stages}  # type: ignore[attr-defined]
        most = max(engine.scratch_bytes for engine in self._engines.values())
        self._scratch = torch.empty(max(most, 1), dtype=torch.uint8, device=self._device.name)
        for engine in self._engines.values():
            engine.share(self._scratch)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch | None = None) -> FloatArray:
        """images_BCHW: by recordings of the accepted batch sizes, or step by step with ``watch``."""
        with self._device.use():
            if watch is not None:
                return self._draw_watched(prompts, seeds, steps, watch)
            parts = [self._replay(prompts[part], seeds[part], steps) for part in split(len(prompts), self.together)]
            images_BCHW: FloatArray = torch.cat(parts).cpu().numpy()
        return images_BCHW

    def _replay(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        batch = len(prompts)
        self._read(prompts)
        recorded = self._recording(batch, steps)
        recorded.noise.copy_(self._noise(seeds))
        recorded.replay()
        return recorded.images.to(torch.float32, copy=True)  # the next replay of this size writes over it

    def _recording(self, batch: int, steps: int) -> _Recorded:
        key = (batch, steps)
        if key not in self._recorded:
            start = torch.zeros(batch, *self._student.latents.shape, device=self._device.name)
            images = torch.empty_like(self._engines[DECODER].tensors(batch)["images"])
            run = self._pass(batch, steps, start, images)
            self._recorded[key] = _Recorded(self._device.record(run), start, images)
        return self._recorded[key]

    def _pass(self, batch: int, steps: int, start: Tensor, images: Tensor) -> Run:
        """All that a picture needs once its ids are in place: text, K steps, decoder."""
        bound = {stage: engine.bind(batch) for stage, engine in self._engines.items()}
        text, decoder = bound[TEXT], bound[DECODER]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            stage = step_stage(sigma, self.boundary)
            bound[stage]["latents"].copy_(x)
            bound[stage]["sigma"].fill_(sigma)
            self._engines[stage].launch(batch)
            return bound[stage]["velocity"]

        def run() -> None:
            self._engines[TEXT].launch(batch)
            for step in (bound[stage] for stage in STEPS if stage in bound):
                for name in text.keys() & step.keys():
                    step[name].copy_(text[name])
            decoder["latents"].copy_(denoise(velocity, start, self._student.sigmas[steps]))
            self._engines[DECODER].launch(batch)
            images.copy_(decoder["images"])

        return run

    def _draw_watched(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch) -> FloatArray:
        """The same launches in the same order, with a callback between two steps; only a preview leaves the device."""
        text = self._text(prompts)

        def show(i: int, sigma: float, x: Tensor, v: Tensor) -> None:
            if i < steps - 1:
                watch(i, lambda rows: self._pictures((x - v * sigma)[list(rows)]).cpu().numpy())

        start = self._noise(seeds).to(self._device.name)
        x: Tensor = denoise(lambda x, sigma: self._velocity(x, sigma, text), start, self._student.sigmas[steps], show)
        images_BCHW: FloatArray = self._pictures(x).cpu().numpy()
        return images_BCHW

    def _text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        for part in split(len(prompts), self.together):
            tensors = self._read(prompts[part])
            self._engines[TEXT].launch(len(prompts[part]))
            for name in self._engines[TEXT].outputs:
                rows.setdefault(name, []).append(tensors[name].clone())
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def _velocity(self, x: Tensor, sigma: float, text: Mapping[str, Tensor]) -> Tensor:
        found, engine = torch.empty_like(x), self._engines[step_stage(sigma, self.boundary)]
        for part in split(len(x), self.together):
            batch = part.stop - part.start
            step = engine.bind(batch)
            step["latents"].copy_(x[part])
            step["sigma"].fill_(sigma)
            for name in text.keys() & step.keys():
                step[name].copy_(text[name][part])
            engine.launch(batch)
            found[part] = step["velocity"]
        return found

    def _pictures(self, x: Tensor) -> Tensor:
        parts = []
        for part in split(len(x), self.together):
            batch = part.stop - part.start
            decoder = self._engines[DECODER].bind(batch)
            decoder["latents"].copy_(x[part])
            self._engines[DECODER].launch(batch)
            parts.append(decoder["images"].float().clone())
        return torch.cat(parts)

    def _read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Copy the prompts' ids to the text engine's inputs."""
        tensors = self._engines[TEXT].bind(len(prompts))
        for name, rows_BL in zip(self.tokens.names, self.tokens.encode(prompts), strict=True):
            tensors[name].copy_(torch.from_numpy(rows_BL))
        return tensors

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.from_numpy(noise(seeds, self._student.latents.shape))


def engine_graphs(
    bundle: Path, student: Student, files: Mapping[str, Path], library: str, in_torch: Mapping[str, Session],
    device: Device | None = None, boundary: float | None = None,
) -> StagedGraphs:  # fmt: skip
    """The graphs with the loop recorded or, if a stage stays in torch, stage by stage."""
    if not in_torch:
        return EngineGraphs(bundle, student, files, library, device, boundary)

    def open_(path: Path) -> EngineSession:
        return open_engine(path, library)

    return StagedGraphs(bundle, student, files, open_, in_torch, boundary)


def tensorrt_runtime(bundle: Path, student: Student, threads: int, name: str | None, library: str) -> CompiledRuntime:
    """The bundle's engine runtime for this GPU and library, or the one in the folder ``name``.

    Raises:
        BundleError: there is none that fits this machine; the message says what differs.
    """
    device = open_device(library)
    folder = name or _fitting(bundle, library)
    manifest = checked_manifest(bundle, student, folder, {library: library_version(library)})
    in_torch = stages_in_torch(bundle, student, manifest, threads, device.name)

    def at(bucket: Bucket | None, there: Student) -> StagedGraphs:
        files = files_of(bundle / RUNTIMES / folder, manifest, bucket)
        return engine_graphs(bundle, there, files, library, in_torch, device, manifest.boundary)

    others = {bucket: at(bucket, there) for bucket, there in in_buckets(student, manifest).items()}
    return SteppedRuntime(bundle, student, threads, folder, at(None, student), others, largest_batch(manifest))


def largest_batch(manifest: RuntimeManifest) -> int:
    """The largest batch that the engines were built for."""
    return max((most for _, _, most in manifest.profiles), default=1)


def _fitting(bundle: Path, library: str) -> str:
    """The folder for this GPU, else the first one, whose refusal will say what differs."""
    gpu, _ = find_gpu()
    there = sorted(path.name for path in (bundle / RUNTIMES).glob(f"{library}-*") if path.is_dir())
    if not there:
        raise BundleError(f"{bundle} has no runtime {library}: make it with export.run --to {library}")
    return next((name for name in there if gpu is not None and f"-{gpu.slug}-" in name), there[0])


def open_device(library: str) -> Device:
    """The GPU, before the library is touched: without a driver its objects crash the process at exit.

    Raises:
        BundleError: there is none, or torch cannot use it.
    """
    gpu, reason = find_gpu()
    if gpu is None:
        raise BundleError(f"{library} needs an NVIDIA GPU, and {reason}")
    if not torch.cuda.is_available():
        raise BundleError(f"{library} needs torch with CUDA, and torch {torch.__version__} is built without it")
    return Cuda()
