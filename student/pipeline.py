"""A student's diffusers pipeline on disk, and how diffusers itself reproduces what is served (needs torch)."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_log
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers.utils import logging as transformers_log

from student.base import ADAPTER, NETWORKS, adapter_folder, pipeline_folder
from student.bundle import BundleError, Student
from student.noise import noise
from student.sampler import pack
from student.saved import check_files, check_index, components, variant_of


def open_pipeline(
    bundle: str | Path,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    local_files_only: bool = True,
    **parts: Any,
) -> Any:
    """The pipeline of a folder or hub id, ready for inference, without a progress bar; only safetensors are read.

    Where a part's weights exist only as a variant (``fp16``), that variant is read, into ``dtype``.

    ``dtype`` may map component names to types, with ``default`` for the others. ``parts`` are components that are given
    rather than read: a trained transformer to be saved, or None for an encoder that is not needed. What was saved as
    None opens as None (diffusers itself must be told: ``from_pretrained(bundle, text_encoder_3=None,
    tokenizer_3=None)``). A bundle that has only an adapter opens as its base with the adapter merged into it, and with
    a student's schedule.

    Raises:
        BundleError: no pipeline there, or one whose files are missing, broken or not accessible.
    """
    if Path(bundle).is_dir() and (base := pipeline_folder(Path(bundle))) != Path(bundle):
        return _adapted(Path(bundle), open_pipeline(base, dtype, **parts), "transformer" not in parts)
    index = read_index(bundle, local_files_only)
    given = {**{name: None for name, value in index.items() if value == [None, None]}, **parts}
    if Path(bundle).is_dir():
        check_files(Path(bundle), index, given)
    variant = variant_of(bundle, index, local_files_only)
    options = {"dtype": dtype, "local_files_only": local_files_only, "use_safetensors": True, "variant": variant}
    # DiffusionPipeline itself would read WanPipeline's transformers again in place of those that are given.
    kind: Any = getattr(diffusers, str(index.get("_class_name")), DiffusionPipeline)
    with _quiet(), _opening(bundle):
        pipe = kind.from_pretrained(bundle, **options, **given)
    pipe.set_progress_bar_config(disable=True)
    for module in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        module.requires_grad_(False).eval()
    return pipe


def _adapted(bundle: Path, pipe: Any, has_transformer: bool) -> Any:
    shift_no_more(pipe)
    if has_transformer:
        with _quiet(), _opening(bundle):
            merge_adapter(pipe, bundle / ADAPTER)
    return pipe


def merge_adapter(pipe: Any, adapter: Path, file: str | None = None, networks: Sequence[str] = NETWORKS) -> None:
    """Merge a folder's LoRA into the pipeline's transformer, and that of a second expert, if there is one, into it."""
    for name in networks:
        folder = adapter_folder(adapter, name)
        if name == NETWORKS[0] or folder.is_dir():
            second = {} if name == NETWORKS[0] else {"load_into_transformer_2": True}
            pipe.load_lora_weights(folder, weight_name=file, **second)
            pipe.fuse_lora(components=[name])
            pipe.unload_lora_weights()
            getattr(pipe, name).requires_grad_(False).eval()


def open_parts(source: str | Path, parts: Sequence[str], dtype: torch.dtype) -> Any:
    """A pipeline of some of its parts; the others are None, and are not read.

    Raises:
        BundleError: as ``open_pipeline``.
    """
    others = set(components(read_index(source, local_files_only=False))) - set(parts)
    return open_pipeline(source, dtype, local_files_only=False, **dict.fromkeys(others))


def read_index(source: str | Path, local_files_only: bool = True) -> dict[str, Any]:
    """The model_index.json of a folder or hub id; no weights are read.

    Raises:
        BundleError: there is none.
    """
    name = DiffusionPipeline.config_name
    if Path(source).is_file():
        raise BundleError(
            f"{source} is a single file: accepted is a folder, to which diffusers converts the file with "
            f"`SomePipeline.from_single_file(file).save_pretrained(folder)`"
        )
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise BundleError(f"{source} is not a folder: accepted are the folder or the hub id of a diffusers pipeline")
    if Path(source).is_dir() and not (Path(source) / name).is_file():
        raise BundleError(f"{source} is not a diffusers pipeline: it has no {name}")
    if Path(source).is_dir():
        check_index(Path(source) / name)
    with _quiet(), _opening(source):
        index: dict[str, Any] = DiffusionPipeline.load_config(source, local_files_only=local_files_only)
    return index


@contextlib.contextmanager
def _opening(source: str | Path) -> Iterator[None]:
    """Say in one sentence why a pipeline could not be opened; full memory is not the pipeline's fault."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        raise BundleError(f"{source} cannot be opened{_why(source, error)}") from error


def _why(source: str | Path, error: BaseException) -> str:
    page = f"https://huggingface.co/{source}"
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f": it is gated; accept its licence at {page} and log in with `hf auth login` or HF_TOKEN"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f" as a folder or as a hub id: none of that name exists, or it is gated or private; if it is, accept its "
            f"licence at {page} and log in with `hf auth login` or HF_TOKEN"
        )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f": {first}" if Path(source).is_dir() else f" as a folder or as a hub id: {first}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def save_pipeline(pipe: Any, bundle: Path, dtype: torch.dtype | None = torch.float16) -> None:
    """Write the pipeline with its weights rounded to ``dtype`` (None keeps the type of each).

    transformers opens text encoders in the type in which they were saved, while diffusers opens the rest in float32,
    and the two do not fit together; so the encoders' config says float32, whatever the file holds.

    Raises:
        ValueError: a weight that is not finite in ``dtype``.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    with _rounded(modules, dtype) if dtype else contextlib.nullcontext(), _quiet():
        pipe.save_pretrained(bundle)
    readable = (bundle / "model_index.json").stat().st_mode
    for weights in bundle.rglob("*.safetensors"):
        weights.chmod(readable)  # they come out readable by their owner alone, who need not be the one that serves
    for path in [bundle / "model_index.json", *(bundle / name / "config.json" for name in modules)]:
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)  # where it was opened from is a path of the machine that saved it
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def shift_no_more(pipe: Any) -> None:
    """Give a student its scheduler: Euler steps at exactly the sigmas that are passed, which are already shifted."""
    pipe.scheduler = _euler()


def reproduce(
    pipe: Any, student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int
) -> NDArray[np.float32]:
    """images_BCHW (videos BFCHW) in [0, 1], generated by the diffusers pipeline's own loop from the seeds' noise."""
    latents = torch.from_numpy(noise(seeds, student.latents.shape))
    sigmas = student.sigmas[steps]
    call = {
        "num_inference_steps": steps,
        "latents": pack(latents) if student.latents.packing == 2 else latents,
        "height": student.image.height,
        "width": student.image.width,
        "max_sequence_length": student.max_tokens,
        "output_type": "np",
        **student.baked,
    }
    if student.image.frames is None:
        with _quiet():  # a prompt that is cut off is cut off by every runtime alike
            pictures_BHWC = pipe(prompt=list(prompts), sigmas=list(sigmas), **call).images
        return np.ascontiguousarray(pictures_BHWC.transpose(0, 3, 1, 2))
    with _quiet(), steps_at(pipe, sigmas):
        videos_BFHWC = pipe(prompt=list(prompts), num_frames=student.image.frames, **call).frames
    return np.ascontiguousarray(videos_BFHWC.transpose(0, 1, 4, 2, 3))


@contextlib.contextmanager
def steps_at(pipe: Any, sigmas: Sequence[float]) -> Iterator[None]:
    """Make the pipeline's own loop step at exactly these sigmas.

    For WanPipeline, which has no argument for them and would shift its own twice (diffusers #13243).
    """
    before, scheduler = pipe.scheduler, _euler()
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda *_, device=None, **__: set_timesteps(sigmas=list(sigmas), device=device)
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def _euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _rounded(modules: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """What is saved of the modules (not buffers that are made anew) in ``dtype``, then in its own type again."""
    types: dict[torch.Tensor, torch.dtype] = {}
    for name, module in modules.items():
        for key, value in module.state_dict(keep_vars=True).items():
            if value.is_floating_point() and value not in types:
                if not value.to(dtype).isfinite().all():
                    raise ValueError(f"{name}.{key} holds values that are not finite in {str(dtype).split('.')[1]}")
                types[value] = value.dtype
    try:
        for value in types:
            value.data = value.data.to(dtype)
        yield
    finally:
        for value, original in types.items():
            value.data = value.data.to(original)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of a second's work, and no remarks on packages and classes that are not used here."""
    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)  # what is an error is raised as well
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # diffusers still passes it
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        diffusers_log.enable_progress_bar()
        transformers_log.enable_progress_bar()  # type: ignore[no-untyped-call]
