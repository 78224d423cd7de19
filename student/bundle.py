"""The student bundle: a diffusers pipeline on disk, and ``student.json``, which says how to sample from it.

Training or adoption writes ``student.json``, and ``export.score`` adds scorers to it; the other parts that export adds
(``runtimes/``, ``scorers/``) have their own manifests, which name what they were made from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from student.writing import write_atomically

FORMAT = 1
MANIFEST = "student.json"
TIME_CONVENTION = "sigma 1 is noise, 0 is data; x = (1 - sigma) * data + sigma * noise; v = noise - data"
ROLES = ("trained", "heldout")
DRAWN_BY = ("files", "sigmas", "latents", "image", "max_tokens", "schedule")
GUIDED = "flux"  # the family that reads a guidance from ``baked``; that of the others is always the same
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

T = TypeVar("T")


class BundleError(ValueError):
    """A bundle that cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class Latents:
    """Geometry of the latents in cells; ``packing`` is the side of the patch that becomes one token (1: none).

    The decoder reads ``latents / scaling_factor + shift_factor``. Only a video's latents have ``frames``; the scaling
    of each channel, where there is one (Wan), is done by the family.
    """

    height: int
    width: int
    channels: int
    packing: int
    scaling_factor: float
    shift_factor: float
    frames: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W): the shape of one image's noise; (C, F, H, W): of one video's."""
        frames = () if self.frames is None else (self.frames,)
        return (self.channels, *frames, self.height, self.width)


@dataclass(frozen=True)
class ImageSize:
    """Size of a picture in pixels; only a video has ``frames``, and ``fps``, its frame rate in training."""

    height: int
    width: int
    frames: int | None = None
    fps: int | None = None


@dataclass(frozen=True)
class Scorer:
    """A scorer of the bundle; ``mean`` and ``std`` are the teacher's raw scores on the calibration prompts.

    The standardised score is ``(raw - mean) / std``. ``file`` is relative to the bundle; ``source_sha256`` is
    ``hash_weights`` of the folder that training loaded the scorer from, since mean and std belong to those weights
    (without it a scorer cannot be compiled). ``reward`` is its name in ``rewards.registry`` ("pickscore",
    "package.module:Class"): a scorer with such a name needs no compiled file where torch is installed.
    """

    file: str
    mean: float
    std: float
    role: Literal["trained", "heldout"]
    source_sha256: str = ""
    reward: str | None = None


@dataclass(frozen=True)
class RewardReference:
    """Distribution of the student's standardised scores on held-out prompts: the reference for drift.

    ``at`` has it for single step counts and sizes ("4", "4 512x768"; see ``student.reference``); ``count`` is the
    number of prompts that it was measured on, which limits how small a drift it can reveal.
    """

    mean: float
    std: float
    percentiles: Mapping[str, float]
    at: Mapping[str, RewardReference] | None = None
    count: int | None = None


@dataclass(frozen=True)
class WithinPrompt:
    """How the standardised scores of ``seeds`` pictures of one prompt vary, pooled over ``prompts`` prompts.

    ``spread`` is their standard deviation within a prompt by scorer; ``correlation`` is that of two scorers within a
    prompt, by both names in order ("heldout trained"). ``gain[scorer][N - 1]`` is how far the highest of N is above the
    prompt's mean. See ``student.within_prompt``.
    """

    prompts: int
    seeds: int
    spread: Mapping[str, float]
    correlation: Mapping[str, float]
    gain: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Student:
    """The contents of ``student.json``.

    ``baked`` holds extra arguments with which diffusers' pipeline must be called. ``within_prompt`` is by step count
    and size (as ``RewardReference.at``), None if it was not measured. ``chosen_at`` is the number of optimizer steps
    after which its weights were the best (0: before the first). ``schedule`` is what the sigmas of other sizes are
    computed from (``student.schedule.by_size``); None if they are ``sigmas`` at every size.

    Raises:
        BundleError: a field outside its range, or fields that contradict each other.
    """

    id: str
    version: str
    family: str
    steps: tuple[int, ...]
    sigmas: Mapping[int, tuple[float, ...]]
    latents: Latents
    image: ImageSize
    max_tokens: int
    baked: Mapping[str, float]
    teacher: str
    scorers: Mapping[str, Scorer]
    reward_reference: Mapping[str, RewardReference] = field(default_factory=dict)
    within_prompt: Mapping[str, WithinPrompt] | None = None
    evaluation: tuple[Mapping[str, Any], ...] = ()
    chosen_at: int | None = None
    schedule: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    time_convention: str = TIME_CONVENTION
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise BundleError(f"format is {self.format}: this version reads format {FORMAT}")
        if self.time_convention != TIME_CONVENTION:
            raise BundleError(f"time_convention is {self.time_convention!r}: accepted is {TIME_CONVENTION!r}")
        for name in ("id", "version", "family"):
            if not NAME.fullmatch(getattr(self, name)):
                raise BundleError(f"{name} is {getattr(self, name)!r}: accepted is {NAME.pattern}")
        _check_steps(self.steps, self.sigmas)
        _check_geometry(self.latents, self.image, self.max_tokens)
        _check_scorers(self.scorers)

    def fingerprint(self) -> str:
        """sha256 of everything that a pixel depends on; a compiled runtime serves only the student it was made from.

        The id, the version and the evaluation do not change a picture and are left out.
        """
        parts = {k: v for k, v in to_json(self).items() if k in DRAWN_BY}
        parts["image"].pop("fps", None)  # how fast it is played changes no pixel
        if self.family == GUIDED and self.baked:
            parts["baked"] = dict(self.baked)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_steps(steps: tuple[int, ...], sigmas: Mapping[int, tuple[float, ...]]) -> None:
    if not steps or set(steps) != set(sigmas) or len(set(steps)) != len(steps):
        raise BundleError(
            f"steps is {list(steps)} and sigmas has {sorted(sigmas)}: accepted is one list of sigmas per step count"
        )
    for count, values in sigmas.items():
        falling = all(a > b for a, b in zip(values, [*values[1:], 0.0], strict=True))
        if len(values) != count or not falling or not values[0] <= 1:
            raise BundleError(f"sigmas[{count}] is {list(values)}: accepted are {count} decreasing values in (0, 1]")


def _check_geometry(latents: Latents, image: ImageSize, max_tokens: int) -> None:
    sizes = (latents.height, latents.width, latents.channels, latents.packing, image.height, image.width, max_tokens)
    frames = [part.frames for part in (latents, image) if part.frames is not None]
    if len(frames) == 1:
        raise BundleError(
            f"latents.frames is {latents.frames} and image.frames is {image.frames}: accepted are both or neither"
        )
    frames += [image.fps] if image.fps is not None else []
    if any(not isinstance(size, int) or size < 1 for size in (*sizes, *frames)):
        raise BundleError(f"latents, image and max_tokens are {sizes}: accepted are whole numbers of 1 or more")
    if latents.height % latents.packing or latents.width % latents.packing:
        raise BundleError(f"latents are {latents.height}x{latents.width}: packing {latents.packing} must divide both")


def _check_scorers(scorers: Mapping[str, Scorer]) -> None:
    for name, scorer in scorers.items():
        if not NAME.fullmatch(name):
            raise BundleError(f"scorers has the name {name!r}: accepted is {NAME.pattern}")
        if scorer.role not in ROLES:
            raise BundleError(f"scorers.{name}.role is {scorer.role!r}: accepted is {' or '.join(ROLES)}")
        if not scorer.std > 0:
            raise BundleError(f"scorers.{name}.std is {scorer.std}: accepted is a number above 0")


def read_student(bundle: Path) -> Student:
    """The manifest of a bundle; the files that it names are not opened (see ``student.files.verify_files``).

    Raises:
        BundleError: there is no bundle, or its manifest lacks what this version needs.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise BundleError(f"{bundle} is not a student: it has no {MANIFEST}")
    try:
        return from_json(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: {error}") from error


def rewrite_student(bundle: Path, student: Student) -> None:
    """Write ``student.json`` (atomically) without hashing the pipeline's files, which have not changed."""
    text = json.dumps(to_json(student), indent=2, allow_nan=False) + "\n"
    write_atomically(bundle / MANIFEST, text.encode())


def to_json(student: Student) -> dict[str, Any]:
    """The manifest as plain JSON values; step counts become the string keys of ``sigmas``."""
    data = asdict(student)
    for part in (data["latents"], data["image"]):
        if part["frames"] is None:
            del part["frames"]  # the fingerprint of a picture's student is older than videos
    if data["image"]["fps"] is None:
        del data["image"]["fps"]
    for name in ("chosen_at", "within_prompt", "schedule"):
        if data[name] is None:
            del data[name]
    for row in data["scorers"].values():
        if row["reward"] is None:
            del row["reward"]
    data["reward_reference"] = {name: _without_at(row) for name, row in data["reward_reference"].items()}
    data["sigmas"] = {str(count): list(student.sigmas[count]) for count in sorted(student.sigmas)}
    return {"format": data.pop("format"), **data, "steps": list(student.steps), "evaluation": list(student.evaluation)}


def _without_at(row: dict[str, Any]) -> dict[str, Any]:
    at = row.pop("at")
    if row["count"] is None:
        del row["count"]
    return row if at is None else {**row, "at": {key: _without_at(part) for key, part in at.items()}}


def from_json(data: dict[str, Any]) -> Student:
    """The inverse of ``to_json``; for a missing or unknown field the error names it."""
    plain = dict(data)
    for name, convert in _CONVERT.items():
        if name in plain:
            plain[name] = convert(plain[name])
    return _build(Student, plain, MANIFEST)


_CONVERT: dict[str, Any] = {
    "steps": tuple,
    "sigmas": lambda value: {int(count): tuple(float(s) for s in row) for count, row in value.items()},
    "latents": lambda value: _build(Latents, value, "latents"),
    "image": lambda value: _build(ImageSize, value, "image"),
    "scorers": lambda value: {name: _build(Scorer, row, f"scorers.{name}") for name, row in value.items()},
    "reward_reference": lambda value: {name: _reference(row, name) for name, row in value.items()},
    "within_prompt": lambda value: {
        key: _build(WithinPrompt, row, f"within_prompt.{key}") for key, row in value.items()
    },
    "evaluation": tuple,
}


def _reference(row: dict[str, Any], name: str) -> RewardReference:
    plain, where = dict(row), f"reward_reference.{name}"
    if plain.get("at") is not None:
        plain["at"] = {key: _build(RewardReference, part, f"{where}.at.{key}") for key, part in plain["at"].items()}
    return _build(RewardReference, plain, where)


def _build(cls: type[T], data: dict[str, Any], where: str) -> T:
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    needed = {f.name for f in fields(cls) if f.default is not None}  # type: ignore[arg-type]
    for name in sorted(needed - data.keys()):
        raise BundleError(f"{where} lacks the field {name!r}")
    for name in sorted(data.keys() - names):
        raise BundleError(f"{where} has the unknown field {name!r}")
    return cls(**data)
