"""From a published few-step pipeline to a student's bundle: weights linked, schedule and guidance the model's own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from export.errors import ExportError
from export.lora import Lora, merge
from export.preflight import available_bytes
from export.source import Source, Weights, class_of, header, hollow_pipeline
from export.store import link
from export.writing import whole_folder, write_atomically
from student.bundle import NAME, ImageSize, Student, read_student, write_student
from student.families.family import Family, SizeError
from student.families.find import family_of
from student.pipeline import shift_no_more

ORIGIN = "origin.json"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
GIVES_SIGMAS = frozenset({"flux", "flux2", "qwen_image", "z_image"})  # pipelines that pass sigmas from 1 to 1/n
SCHNELL_TOKENS = 256  # FLUX.1-schnell was distilled with prompts of so many
SPARE_BYTES = 64 * 2**20  # configurations, tokenizers, the card
TERMS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Adoption:
    """What is asked for; ``size`` is (height, width) in pixels, and None the model's own."""

    source: Source
    steps: tuple[int, ...]
    out: Path
    loras: tuple[Lora, ...] = ()
    size: tuple[int, int] | None = None
    frames: int = 1
    guidance: float | None = None
    say: Say = print

    def identity(self) -> str:
        """sha256 of what makes the student what it is: the same command finds it again."""
        files = {
            f"{part}/{file.name}": [file.stat().st_size, _head(file)]
            for part, weights in self.source.weights.items()
            for file in weights.files
        }
        loras = [asdict(lora) for lora in self.loras]
        facts = [files, loras, self.steps, self.size, self.frames, self.guidance, dict(self.source.index)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _head(file: Path) -> str:
    return hashlib.sha256(json.dumps(header(file), sort_keys=True).encode()).hexdigest()


def adopt(asked: Adoption) -> Student:
    """Write the bundle, whole or not at all, or find it there.

    Raises:
        ExportError, BundleError: the model cannot be served so; one sentence that says what is supported.
    """
    if found := _already(asked):
        asked.say(f"{asked.out} is there already")
        return found
    pipe = hollow_pipeline(asked.source)
    student = manifest(asked, pipe)
    check_room(asked)
    with whole_folder(asked.out) as unfinished:
        _write_pipeline(asked, pipe, unfinished)
        (unfinished / ORIGIN).write_text(json.dumps(_origin(asked), indent=2) + "\n", "utf-8")
        (unfinished / "README.md").write_text(card(asked, student), "utf-8")
        for name in TERMS:
            if (asked.source.folder / name).is_file():
                shutil.copyfile(asked.source.folder / name, unfinished / name)
        asked.say("reading every file once, for its sha256")
        return write_student(unfinished, student)


def _already(asked: Adoption) -> Student | None:
    if not asked.out.exists():
        return None
    origin = asked.out / ORIGIN
    same = origin.is_file() and json.loads(origin.read_text("utf-8")).get("identity") == asked.identity()
    if not same:
        raise ExportError(f"{asked.out} is there already and is not this student: choose another --out")
    return read_student(asked.out)


def manifest(asked: Adoption, pipe: Any) -> Student:
    """What student.json says, but for the files.

    Raises:
        ExportError: a scheduler, a size or a number of steps that the model cannot be followed in.
    """
    if type(pipe.scheduler).__name__ != SCHEDULER:
        raise ExportError(
            f"{asked.source.name} steps by a {type(pipe.scheduler).__name__}, whose steps are no plain Euler steps: "
            f"supported is {SCHEDULER}"
        )
    family = family_of(pipe, **_options(asked, pipe))
    height, width = asked.size or _own_size(pipe)
    try:
        latents = family.geometry(height, width, asked.frames)
    except SizeError as error:
        raise ExportError(f"{asked.source.name} cannot draw {width}x{height}: {error}") from error
    frames = None if latents.frames is None else asked.frames
    return Student(
        id=_id(asked.out),
        version="1",
        family=family.name,
        steps=asked.steps,
        sigmas={steps: own_sigmas(family, steps, latents.shape) for steps in asked.steps},
        latents=latents,
        image=ImageSize(height, width, frames),
        max_tokens=family.max_tokens,
        baked=family.baked,
        teacher=asked.source.name,
        scorers={},
    )


def _options(asked: Adoption, pipe: Any) -> dict[str, Any]:
    if type(pipe).__name__ != "FluxPipeline":
        if asked.guidance not in (None, 1.0):
            raise ExportError(
                f"guidance is {asked.guidance:g}: a {type(pipe).__name__} is drawn without guidance, by one call a step"
            )
        return {}
    embedded = bool(pipe.transformer.config.guidance_embeds)
    if asked.guidance is not None and not embedded:
        raise ExportError(f"guidance is {asked.guidance:g}: {asked.source.name} is told no guidance, as FLUX.1-schnell")
    return {"guidance": asked.guidance} if embedded else {"max_tokens": SCHNELL_TOKENS}


def _own_size(pipe: Any) -> tuple[int, int]:
    cells = getattr(pipe, "default_sample_size", None)
    if cells is None:
        raise ExportError(f"a {type(pipe).__name__} has no size of its own: say --size WIDTHxHEIGHT")
    side = int(cells) * int(pipe.vae_scale_factor)
    return side, side


def own_sigmas(family: Family, steps: int, shape: Sequence[int]) -> tuple[float, ...]:
    """The sigmas that the model's own pipeline steps at, from its own scheduler, without the final 0.

    A static shift is applied twice there (diffusers #13243), and a few-step model was distilled or tuned for the
    result: so it is kept.

    Raises:
        ExportError: they do not fall from 1 to 0.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config)  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {}
    if family.scheduler_config.get("use_dynamic_shifting"):
        options["mu"] = family._dynamic_mu(family.scheduler_config, family._num_tokens(shape), steps)
    if family.name in GIVES_SIGMAS:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
    else:
        scheduler.set_timesteps(steps, **options)
    found = tuple(float(sigma) for sigma in scheduler.sigmas[:-1])
    if not all(a > b for a, b in zip(found, [*found[1:], 0.0], strict=True)) or found[0] > 1:
        raise ExportError(f"the scheduler's {steps} sigmas are {found}: accepted are sigmas that fall from 1 to 0")
    return found


def _id(out: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-.")
    if not NAME.fullmatch(name):
        raise ExportError(f"--out is {out}: accepted is a folder whose name begins with a letter or a digit")
    return name


def check_room(asked: Adoption) -> None:
    """Refuse to begin what cannot be ended.

    Raises:
        ExportError: too little disk for what must be written, or memory for what must be loaded.
    """
    place = asked.out.parent
    while not place.exists():
        place = place.parent
    weights = asked.source.weights
    merged = weights["transformer"].bytes if asked.loras else 0
    rewritten = {"transformer"} if asked.loras else set()
    copied = sum(one.bytes for part, one in weights.items() if part in rewritten or not _links(one, place))
    needed, free = copied + SPARE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(f"{asked.out} needs {_gb(needed)} of free disk, and {_gb(free)} are there")
    memory = available_bytes()
    if merged and memory is not None and memory < int(1.2 * merged):
        raise ExportError(f"merging a LoRA needs {_gb(int(1.2 * merged))} of memory, and {_gb(memory)} are free")


def _links(weights: Weights, place: Path) -> bool:
    """Whether files can get a second name there: the same file system, as far as it says."""
    return all(file.resolve().stat().st_dev == place.stat().st_dev for file in weights.files)


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _write_pipeline(asked: Adoption, pipe: Any, folder: Path) -> None:
    shift_no_more(pipe)
    for name in asked.source.parts:
        place = folder / name
        place.mkdir()
        if name == "transformer" and asked.loras:
            _write_merged(asked, pipe, place)
        elif name in asked.source.weights:
            _link_weights(asked.source, name, place)
        else:
            part = getattr(pipe, name)
            part.save_pretrained(place)
    index = {key: value for key, value in asked.source.index.items() if key != "_name_or_path"}
    index["scheduler"] = ["diffusers", SCHEDULER]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _link_weights(source: Source, name: str, place: Path) -> None:
    """The part's weights under plain names, and its configuration, which says float32: every part is opened so."""
    for file, plain in source.weights[name].plain_names().items():
        link(file.resolve(), place / plain)
    if sharded := source.weights[name].plain_index():
        (place / sharded[0]).write_text(json.dumps(sharded[1], indent=2) + "\n", "utf-8")
    for config in (source.folder / name).glob("*.json"):
        if ".index" in config.name or config.name in {path.name for path in place.iterdir()}:
            continue
        data = json.loads(config.read_text("utf-8"))
        data.pop("_name_or_path", None)
        for key in ("dtype", "torch_dtype"):
            if key in data:
                data[key] = "float32"
        (place / config.name).write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _write_merged(asked: Adoption, pipe: Any, place: Path) -> None:
    library, kind = asked.source.parts["transformer"]
    folder = asked.source.folder / "transformer"
    weights = asked.source.weights["transformer"]
    options: dict[str, Any] = {"variant": weights.variant} if weights.variant else {}
    dtype = _stored_type(weights)
    transformer: Any = class_of(library, kind, asked.source.name)
    pipe.register_modules(transformer=transformer.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options))
    for lora in asked.loras:
        layers = merge(pipe, lora)
        asked.say(f"merged {lora.name} with weight {lora.weight:g} into {layers} layers")
    pipe.transformer.save_pretrained(place)


def _stored_type(weights: Weights) -> torch.dtype:
    """What most of the numbers are on disk."""
    counts: dict[str, int] = {}
    for file in weights.files:
        for row in header(file).values():
            first, last = row["data_offsets"]
            counts[row["dtype"]] = counts.get(row["dtype"], 0) + last - first
    most = max(counts, key=lambda name: counts[name], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def _origin(asked: Adoption) -> dict[str, Any]:
    loras = [{"name": lora.name, "weight": lora.weight} for lora in asked.loras]
    return {"identity": asked.identity(), "model": asked.source.name, "loras": loras, "licence": licence(asked.source)}


def licence(source: Source) -> str:
    """What the source's own card calls its terms."""
    front = front_matter(source.folder / "README.md")
    name = front.get("license_name") if front.get("license") == "other" else front.get("license")
    return name or front.get("license") or ("see LICENSE" if _terms(source) else "unknown")


def _terms(source: Source) -> bool:
    return any((source.folder / name).is_file() for name in TERMS)


def front_matter(readme: Path) -> Mapping[str, str]:
    """The plain ``key: value`` lines between the dashes that a card begins with."""
    if not readme.is_file():
        return {}
    found = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    lines = re.findall(r"^([A-Za-z_]+):[ \t]*(\S.*)$", found[1], re.MULTILINE) if found else []
    return {key: value.strip().strip("\"'") for key, value in lines}


def card(asked: Adoption, student: Student) -> str:
    """A model card in the hub's form: where it came from, under which terms, and how it is drawn."""
    front = front_matter(asked.source.folder / "README.md")
    terms = {key: front[key] for key in ("license", "license_name", "license_link") if key in front}
    lines = ["---", *(f"{key}: {value}" for key, value in terms.items()), "library_name: diffusers"]
    lines += ["pipeline_tag: text-to-image" if student.image.frames is None else "pipeline_tag: text-to-video"]
    lines += [f"base_model: {asked.source.name}", "tags:", "- fewstep", "---", "", f"# {student.id}", ""]
    lines += [f"{asked.source.name}, adopted by fewstep as it is: nothing was trained."]
    lines += [f"Merged into it: {lora.name}, weight {lora.weight:g}." for lora in asked.loras]
    lines += [f"Terms: {licence(asked.source)}, as its authors' card says; they hold for this copy too.", ""]
    lines += ["| steps | sigmas of its own scheduler |", "|---|---|"]
    sigmas = {steps: ", ".join(f"{sigma:.6g}" for sigma in student.sigmas[steps]) for steps in student.steps}
    lines += [f"| {steps} | {row} |" for steps, row in sigmas.items()]
    size = f"{student.image.width}x{student.image.height}"
    baked = ", ".join(f"{name} {value:g}" for name, value in student.baked.items()) or "no guidance"
    lines += ["", f"Drawn at {size} pixels, with {baked} and prompts of up to {student.max_tokens} tokens.", ""]
    return "\n".join(lines)


def add_rewards_to_card(bundle: Path, student: Student) -> None:
    """The table of scores under the card's own text."""
    path = bundle / "README.md"
    if not path.is_file() or not student.scorers:
        return
    title = "## Rewards"
    before, _, rest = path.read_text("utf-8").partition(f"\n{title}\n")
    after = rest.partition("\n## ")[2]
    rows = [
        f"| {name} | {scorer.reward or scorer.file} | {scorer.mean:.5g} | {scorer.std:.4g} |"
        for name, scorer in student.scorers.items()
    ]
    head = ["| scorer | reward | raw mean of its own pictures (0) | deviation (1) |", "|---|---|---|---|"]
    text = "\n".join([before.rstrip(), "", title, "", *head, *rows]) + "\n" + (f"\n## {after}" if after else "")
    write_atomically(path, text.encode())
