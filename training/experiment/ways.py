"""What would make a step fit into a GPU's memory: settings in the order of their price, and two of them together.

The price is time, then precision, then what can be learnt, then GPUs, then the size of the picture. A setting that was
counted is that row's; another is computed from what the step holds: of frozen weights, of what learns, and of what each
part takes beside them. Two that save in different places save both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from training.rats.config import RatsConfig

PARTS_OF_A_BATCH = ("teacher", "validation")  # what draws several pictures at once
NF4_OF_BF16 = 0.2578  # 4 bits for each weight, and a scale for each 64 of them
IN_8_BITS = 10 / 16  # of what is learnt: weight and average of 4 bytes, two moments of 1 in place of 4
SMALL_RANK = 8
SHARDED = "compute.shard"
NOT_SHARDED = ("compute.quantise", "optim.state=8bit")  # what compute.shard refuses


@dataclass(frozen=True)
class Need:
    """GB of one step: what it holds of frozen ``weights`` and of what is ``learnt``, and ``rest`` by its part."""

    weights: float
    learnt: float
    rest: Mapping[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Need:
        """That of a counted row."""
        held = sum(row["held"].values())
        rest = {part: gb - held for part, gb in row["peak"].items()}
        return cls(row["held"]["weights"], row["held"]["learnt"], rest)

    @property
    def most(self) -> float:
        """The peak."""
        return self.weights + self.learnt + max(self.rest.values())

    def times(self, rest: float = 1.0, weights: float = 1.0, learnt: float = 1.0) -> Need:
        """The same with shares of its parts."""
        return Need(self.weights * weights, self.learnt * learnt, {k: gb * rest for k, gb in self.rest.items()})

    def moved(self, before: Need, after: Need) -> Need:
        """The same with the differences between two others."""
        rest = {part: gb + after.rest.get(part, 0.0) - before.rest[part] for part, gb in self.rest.items()}
        return Need(self.weights + after.weights - before.weights, self.learnt + after.learnt - before.learnt, rest)


Way = tuple[str, Callable[[Need], Need]]


def fitting_ways(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], config: RatsConfig, room_gb: float
) -> list[tuple[str, float]]:
    """The ways that fit, each with its GB: single settings, then two, neither of which is enough alone."""
    need, ways = Need.of(row), list(_ways(row, rows, config))
    alone = [(name, gb) for name, save in ways if (gb := save(need).most) <= room_gb]
    too_little = [way for way in ways if way[0] not in dict(alone)]
    pairs = [
        (f"{one} and {other}", gb)
        for (one, save), (other, save_too) in combinations(too_little, 2)
        if _together(one, other) and (gb := save_too(save(need)).most) <= room_gb
    ]
    return [*_fewest_gpus(alone), *_fewest_gpus(pairs)]


def _fewest_gpus(found: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    first = next((way for way in found if SHARDED in way[0]), None)
    return [way for way in found if SHARDED not in way[0] or way is first]


def _together(one: str, other: str) -> bool:
    """Whether two settings may be set at once."""
    if one.partition("=")[0] == other.partition("=")[0]:
        return False
    return SHARDED not in one + other or not any(name in one + other for name in NOT_SHARDED)


def _ways(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], config: RatsConfig) -> Iterator[Way]:
    """All single settings that this configuration has not yet, in the order of their price."""
    yield from _slower(row, rows, config)
    yield from _narrower(row, rows, config)
    if not config.compute.quantise and not config.compute.shard:
        for num in (2, 4, 8):
            said = f"{SHARDED}=true and compute.shard_frugal=true on {num} GPUs, each"
            yield said, partial(Need.times, weights=1 / num, learnt=1 / num)
    yield from _smaller(config)


def _slower(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], config: RatsConfig) -> Iterator[Way]:
    if config.validation.batch > 1 or config.teacher.batch > 1:
        yield "validation.batch=1 and teacher.batch=1", _one_at_a_time
    for key in ("gradient.mode", "compute.tile_px", "optim.state"):
        yield from _counted(row, rows, key)


def _one_at_a_time(need: Need) -> Need:
    """What draws several pictures at once takes no more than the rest of a step then."""
    most = max(gb for part, gb in need.rest.items() if part not in PARTS_OF_A_BATCH)
    return replace(need, rest={part: min(gb, most) for part, gb in need.rest.items()})


def _narrower(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], config: RatsConfig) -> Iterator[Way]:
    if config.optim.state == "fp32" and not config.compute.shard:
        yield "optim.state=8bit", partial(Need.times, learnt=IN_8_BITS)
    for name, to_nf4 in _counted(row, rows, "compute.quantise"):
        yield "compute.quantise=fp8", partial(_in_8_bits, to_nf4)
        yield name, to_nf4
    if config.lora.rank > SMALL_RANK:
        yield f"lora.rank={SMALL_RANK}", partial(Need.times, learnt=SMALL_RANK / config.lora.rank)


def _in_8_bits(to_nf4: Callable[[Need], Need], need: Need) -> Need:
    """From what 4 bits save: of 16 bits 8 are half."""
    saved = need.weights - to_nf4(need).weights
    return replace(need, weights=need.weights - saved / (1 - NF4_OF_BF16) / 2)


def _counted(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str) -> Iterator[Way]:
    """The rows that differ in this key alone."""
    own = row["settings"]
    for other in rows:
        theirs = other["settings"]
        apart = {name for name in {*own, *theirs} if own.get(name) != theirs.get(name)}
        if apart == {key} and other["processes"] == row["processes"] and _saves(row, other):
            value = theirs.get(key, "detached")  # all that a preset itself says of these keys
            yield f"{key}={value}", partial(Need.moved, before=Need.of(row), after=Need.of(other))


def _saves(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return max(other["peak"].values()) < max(row["peak"].values())


def _smaller(config: RatsConfig) -> Iterator[Way]:
    """Pictures of a half and a quarter of each side, and of a video half of the frames."""
    image = config.image
    for share in (2, 4):
        height, width = image.height_px // share // 64 * 64, image.width_px // share // 64 * 64
        if height and width:
            area = height * width / (image.height_px * image.width_px)
            said = f"image.height_px={height} and image.width_px={width}"
            yield said, partial(Need.times, rest=area)
    latent, half = (image.frames - 1) // 4 + 1, (image.frames - 1) // 8
    if half:
        said = f"image.frames={4 * half + 1}"
        yield said, partial(Need.times, rest=(half + 1) / latent)
