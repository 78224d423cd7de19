"""Turns a published few-step pipeline into a student's bundle: linked weights, its own schedule and guidance."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from export.card import TERMS, adopted_card, licence
from export.errors import ExportError
from export.lora import Lora
from export.parts import rewrites, write_pipeline
from export.request import Say
from export.source import MULTISTEP, SCHEDULER, Source, Weights, header, hollow_pipeline
from export.writing import whole_folder
from student.bundle import NAME, ImageSize, Student, read_student
from student.families.family import Family, SizeError
from student.families.find import family_of
from student.files import write_student
from student.runtimes.machine import free_bytes
from student.runtimes.placement import TRANSFORMERS
from student.schedule import by_size

ORIGIN = "origin.json"
GIVES_SIGMAS = frozenset({"flux", "flux2", "qwen_image", "z_image"})  # pipelines that pass sigmas from 1 to 1/n
SCHNELL_TOKENS = 256  # FLUX.1-schnell was distilled with prompts of so many
SPARE_BYTES = 64 * 2**20  # configurations, tokenizers, the card


@dataclass(frozen=True)
class Adoption:
    """A request to adopt a model; ``size`` is (height, width) in pixels, None for the model's own.

    Raises:
        ExportError: a name that no student may have.
    """

    source: Source
    steps: tuple[int, ...]
    out: Path
    loras: tuple[Lora, ...] = ()
    size: tuple[int, int] | None = None
    frames: int = 1
    guidance: float | None = None
    id: str = ""  # empty: the folder's name
    version: str = "1"
    say: Say = print

    def __post_init__(self) -> None:
        for option, name in (("--id", self.id or "student"), ("--version", self.version)):
            if not NAME.fullmatch(name):
                raise ExportError(
                    f"{option} is {name!r}: accepted are up to 64 characters out of a to z, digits, '.', '_' and '-', "
                    "starting with a letter or digit"
                )

    def identity(self) -> str:
        """sha256 of all that determines the student, so that the same command recognises it."""
        files = {
            f"{part}/{file.name}": [file.stat().st_size, _head(file)]
            for part, weights in self.source.weights.items()
            for file in weights.files
        }
        loras = [asdict(lora) for lora in self.loras]
        facts: list[Any] = [files, loras, self.steps, self.size, self.frames, self.guidance, dict(self.source.index)]
        if (self.id, self.version) != ("", "1"):
            facts.append([self.id, self.version])
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _head(file: Path) -> str:
    return hashlib.sha256(json.dumps(header(file), sort_keys=True).encode()).hexdigest()


def adopt(asked: Adoption) -> Student:
    """Write the bundle atomically, or return the one that is already there.

    Raises:
        ExportError, BundleError: the model cannot be served like this; one sentence says what is supported.
    """
    if found := _already(asked):
        asked.say(f"{asked.out} already exists")
        return found
    pipe = hollow_pipeline(asked.source)
    check_shapes(asked.source, pipe)
    student = manifest(asked, pipe)
    check_room(asked)
    with whole_folder(asked.out) as unfinished:
        write_pipeline(asked.source, asked.loras, pipe, unfinished, asked.say)
        (unfinished / ORIGIN).write_text(json.dumps(_origin(asked), indent=2) + "\n", "utf-8")
        (unfinished / "README.md").write_text(adopted_card(asked.source, asked.loras, student), "utf-8")
        for name in TERMS:
            if (asked.source.folder / name).is_file():
                shutil.copyfile(asked.source.folder / name, unfinished / name)
        asked.say("hashing every file")
        return write_student(unfinished, student)


def check_shapes(source: Source, pipe: Any) -> None:
    """Refuse weights of a transformer that are not those of its config: diffusers would start from random ones.

    Raises:
        ExportError: a weight is missing or has another shape.
    """
    for part in TRANSFORMERS:
        network = getattr(pipe, part, None)
        if source.base or network is None or network.config.get("quantization_config"):
            continue  # a single file's names are its authors' own, and it was held to the pipeline's already
        rows = {key: row for file in source.weights[part].files for key, row in header(file).items()}
        for key, value in network.named_parameters():
            shape = rows[key]["shape"] if key in rows else "missing"
            if shape != list(value.shape):
                raise ExportError(
                    f"{source.folder / part} has other weights than its config.json says: {key} is {shape}, not "
                    f"{list(value.shape)}"
                )


def _already(asked: Adoption) -> Student | None:
    if not asked.out.exists():
        return None
    origin = asked.out / ORIGIN
    same = origin.is_file() and json.loads(origin.read_text("utf-8")).get("identity") == asked.identity()
    if not same:
        raise ExportError(f"{asked.out} already exists and is not this student: choose another --out")
    return read_student(asked.out)


def manifest(asked: Adoption, pipe: Any) -> Student:
    """The content of student.json, except for the files.

    Raises:
        ExportError: a scheduler, a size or a step count that is not supported for this model.
    """
    if not (type(pipe.scheduler).__name__ == SCHEDULER or multistep(pipe.scheduler)):
        raise ExportError(
            f"{asked.source.name} has a {type(pipe.scheduler).__name__}, which does not take plain Euler steps: "
            f"supported are {SCHEDULER}, and {MULTISTEP} with flow sigmas"
        )
    family = family_of(pipe, **_options(asked, pipe))
    height, width = asked.size or _own_size(pipe)
    try:
        latents = family.geometry(height, width, asked.frames)
    except SizeError as error:
        raise ExportError(f"{asked.source.name} cannot generate {width}x{height}: {error}") from error
    frames = None if latents.frames is None else asked.frames
    return Student(
        id=asked.id or _id(asked.out),
        version=asked.version,
        family=family.name,
        steps=asked.steps,
        sigmas={steps: own_sigmas(family, steps, latents.shape) for steps in asked.steps},
        latents=latents,
        image=ImageSize(height, width, frames, family.fps if frames else None),
        max_tokens=family.max_tokens,
        baked=family.baked,
        teacher=asked.source.name,
        scorers={},
        schedule=own_schedule(family, asked.steps, latents.shape),
    )


def _options(asked: Adoption, pipe: Any) -> dict[str, Any]:
    if type(pipe).__name__ != "FluxPipeline":
        if asked.guidance not in (None, 1.0):
            raise ExportError(
                f"guidance is {asked.guidance:g}: a {type(pipe).__name__} is served without guidance, one call per step"
            )
        return {}
    embedded = bool(pipe.transformer.config.guidance_embeds)
    if asked.guidance is not None and not embedded:
        raise ExportError(f"guidance is {asked.guidance:g}: {asked.source.name}, like FLUX.1-schnell, takes none")
    return {"guidance": asked.guidance} if embedded else {"max_tokens": SCHNELL_TOKENS}


def _own_size(pipe: Any) -> tuple[int, int]:
    cells = getattr(pipe, "default_sample_size", None)
    if cells is None:
        raise ExportError(f"a {type(pipe).__name__} has no size of its own: give --size WIDTHxHEIGHT")
    side = int(cells) * int(pipe.vae_scale_factor)
    return side, side


def own_sigmas(family: Family, steps: int, shape: Sequence[int]) -> tuple[float, ...]:
    """The sigmas that the model's own pipeline uses, from its own scheduler, without the final 0.

    A ``MULTISTEP`` scheduler keeps its sigmas too; the steps between them become Euler steps, as its first step is one.
    diffusers applies a static shift twice (#13243), and a few-step model was distilled or tuned for the result, so that
    is kept.

    Raises:
        ExportError: they do not decrease from 1 to 0.
    """
    kind: Any = UniPCMultistepScheduler if multistep(family.scheduler_config) else FlowMatchEulerDiscreteScheduler
    scheduler: Any = kind.from_config(family.scheduler_config)
    options: dict[str, Any] = {}
    if family.scheduler_config.get("use_dynamic_shifting"):
        options["mu"] = family._dynamic_mu(family.scheduler_config, family._num_tokens(shape), steps)
    if family.name in GIVES_SIGMAS:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
    else:
        scheduler.set_timesteps(steps, **options)
    found = tuple(float(sigma) for sigma in scheduler.sigmas[:-1])
    if not all(a > b for a, b in zip(found, [*found[1:], 0.0], strict=True)) or found[0] > 1:
        raise ExportError(f"the scheduler's {steps} sigmas are {found}: accepted are sigmas that decrease from 1 to 0")
    return found


def own_schedule(family: Family, steps: Sequence[int], shape: Sequence[int]) -> dict[str, Any] | None:
    """What the sigmas of other sizes are computed from; None if they are the same there, or not so computed here."""
    config = family.scheduler_config
    last = None if family.name in GIVES_SIGMAS else 1 / config.get("num_train_timesteps", 1000)
    if (found := by_size(config, last)) is None:
        return None
    pairs = [(family.sigmas(nfe, shape, found), own_sigmas(family, nfe, shape)) for nfe in steps]
    return found if all(np.allclose(ours, own, atol=1e-6) for ours, own in pairs) else None


def multistep(scheduler: Any) -> bool:
    """Whether a scheduler, or its configuration, is UniPC on the straight path of a flow model."""
    config = getattr(scheduler, "config", scheduler)
    flows = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return bool(flows) and (scheduler is config or type(scheduler).__name__ == MULTISTEP)


def _id(out: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-.")
    if not NAME.fullmatch(name):
        raise ExportError(f"--out is {out}: accepted is a folder whose name begins with a letter or digit")
    return name


def check_room(asked: Adoption) -> None:
    """Refuse an adoption that could not be finished.

    Raises:
        ExportError: too little disk space for what must be written, or memory for what must be loaded.
    """
    place = asked.out.parent
    while not place.exists():
        place = place.parent
    weights = asked.source.weights
    rewritten = {"transformer"} if rewrites(asked.source, asked.loras) else set[str]()
    copied = sum(one.bytes for part, one in weights.items() if part in rewritten or not _links(one, place))
    needed, free = copied + SPARE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(f"{asked.out} needs {_gb(needed)} of disk space, and {_gb(free)} are free")
    memory, loaded = free_bytes(), sum(weights[part].bytes for part in rewritten)
    copies, why = (2.2, f"converting {asked.source.name}") if asked.source.base else (1.2, "merging a LoRA")
    if memory is not None and memory < int(copies * loaded):
        raise ExportError(f"{why} needs {_gb(int(copies * loaded))} of memory, and {_gb(memory)} are free")


def _links(weights: Weights, place: Path) -> bool:
    """Whether hard links to the files are possible there, that is, on the same file system."""
    return all(file.resolve().stat().st_dev == place.stat().st_dev for file in weights.files)


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _origin(asked: Adoption) -> dict[str, Any]:
    loras = [{"name": lora.name, "weight": lora.weight} for lora in asked.loras]
    about = {"model": asked.source.name, **({"config": asked.source.base} if asked.source.base else {})}
    return {"identity": asked.identity(), **about, "loras": loras, "licence": licence(asked.source)}
