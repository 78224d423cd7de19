"""Every field of student.json: read as it was written, followed by the fingerprint if a pixel depends on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from student.bundle import (
    BundleError,
    ImageSize,
    Latents,
    RewardReference,
    Scorer,
    Student,
    WithinPrompt,
    from_json,
    read_student,
    rewrite_student,
    to_json,
)

AT = {"2": RewardReference(0.5, 0.9, {"50": 0.4}, count=12), "2 96x32": RewardReference(0.1, 0.2, {})}
STUDENT = Student(
    id="id-1",
    version="7.b_c",
    family="wan",
    steps=(2, 1),
    sigmas={2: (1.0, 0.5), 1: (0.99,)},
    latents=Latents(6, 4, 16, 2, 0.36, 0.11, frames=3),
    image=ImageSize(48, 32, 9, 16),
    max_tokens=77,
    baked={"guidance_scale": 3.5},
    teacher="teacher",
    scorers={
        "named": Scorer("scorers/named.onnx", 0.5, 2.0, "trained", "ab", "pickscore"),
        "own": Scorer("scorers/own.onnx", -0.5, 0.2, "heldout", "cd"),
    },
    reward_reference={"named": RewardReference(0.4, 0.8, {"1": -1.0, "99": 2.0}, AT, 64)},
    within_prompt={"2": WithinPrompt(4, 8, {"named": 0.5, "own": 0.4}, {"named own": 0.2}, {"named": (0.0, 0.3)})},
    evaluation=({"model": "x", "steps": 2},),
    chosen_at=0,
    schedule={"use_dynamic_shifting": True, "base_shift": 0.5},
    files={"vae/config.json": "ef"},
)
NO_PIXEL = {
    "id", "version", "family", "steps", "teacher", "scorers", "reward_reference", "within_prompt", "evaluation",
    "chosen_at", "baked",
}  # fmt: skip


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return {**value, "another": "0"}


def _changes() -> Iterator[tuple[str, Student]]:
    """The student with one field changed, nested fields one by one."""
    single: dict[str, Any] = {
        "steps": (1, 2), "scorers": {}, "reward_reference": {}, "within_prompt": None, "evaluation": (),
        "sigmas": {2: (1.0, 0.4), 1: (0.99,)},
    }  # fmt: skip
    for one in fields(Student):
        value = getattr(STUDENT, one.name)
        if one.name in ("format", "time_convention"):
            continue
        if not is_dataclass(value):
            changed = single[one.name] if one.name in single else _other(value)
            yield one.name, replace(STUDENT, **{one.name: changed})
            continue
        for inner in fields(value):
            now: Any = getattr(value, inner.name)
            more = now * 2 if inner.name in ("height", "width", "packing") else _other(now)
            if inner.name == "packing":
                more = 1
            part: Any = replace(value, **{inner.name: more})
            yield f"{one.name}.{inner.name}", replace(STUDENT, **{one.name: part})


CHANGES = dict(_changes())


def test_every_field_is_read_as_it_was_written(tmp_path: Path) -> None:
    for one in fields(Student):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        assert one.name in ("format", "time_convention") or getattr(STUDENT, one.name) != default, one.name
    rewrite_student(tmp_path, STUDENT)
    found = read_student(tmp_path)
    assert json.loads(json.dumps(to_json(found))) == json.loads((tmp_path / "student.json").read_text("utf-8"))
    assert replace(found, within_prompt=None) == replace(STUDENT, within_prompt=None)
    assert found.within_prompt is not None and list(found.within_prompt["2"].gain["named"]) == [0.0, 0.3]
    assert list(to_json(STUDENT)["sigmas"]) == ["1", "2"] and to_json(STUDENT)["steps"] == [2, 1]


def test_what_is_not_said_is_not_written_so_that_earlier_releases_can_read_it() -> None:
    plain = replace(
        STUDENT,
        latents=replace(STUDENT.latents, frames=None),
        image=ImageSize(48, 32),
        scorers={"own": STUDENT.scorers["own"]},
        reward_reference={"own": RewardReference(0.0, 1.0, {}, {"2": RewardReference(0.0, 1.0, {})})},
        within_prompt=None,
        chosen_at=None,
        schedule=None,
    )
    written = to_json(plain)
    assert from_json(json.loads(json.dumps(written))) == plain
    assert not {"within_prompt", "chosen_at", "schedule"} & written.keys()
    assert set(written["image"]) == {"height", "width"} and "frames" not in written["latents"]
    assert "reward" not in written["scorers"]["own"]
    assert set(written["reward_reference"]["own"]) == {"mean", "std", "percentiles", "at"}
    assert set(written["reward_reference"]["own"]["at"]["2"]) == {"mean", "std", "percentiles"}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_changes_with_what_a_pixel_depends_on_alone(name: str) -> None:
    """How fast a video is played changes none."""
    kept = name in NO_PIXEL or name == "image.fps"
    assert (CHANGES[name].fingerprint() == STUDENT.fingerprint()) is kept


def test_the_guidance_that_flux_reads_changes_its_pixels() -> None:
    """A graph is compiled with it; where there is none, the fingerprint is that of earlier releases."""
    flux = replace(STUDENT, family="flux", baked={"guidance_scale": 3.5})
    assert flux.fingerprint() != replace(flux, baked={"guidance_scale": 2.0}).fingerprint()
    assert replace(flux, baked={}).fingerprint() == STUDENT.fingerprint() != flux.fingerprint()


def test_the_other_changes_are_of_every_field() -> None:
    assert {name.partition(".")[0] for name in CHANGES} | {"format", "time_convention"} == {
        one.name for one in fields(Student)
    }


@pytest.mark.parametrize("name", ["id", "version", "family"])
@pytest.mark.parametrize(
    ("value", "good"), [("a" * 64, True), ("a" * 65, False), ("", False), (".a", False), ("a/b", False)]
)
def test_a_name_has_up_to_64_plain_characters(name: str, value: str, good: bool) -> None:
    if good:
        assert getattr(replace(STUDENT, **{name: value}), name) == value
    else:
        with pytest.raises(BundleError, match=f"^{name} is '{value}': accepted is"):
            replace(STUDENT, **{name: value})


@pytest.mark.parametrize("name", ["a b", "", "../x", "a" * 65])
def test_a_scorers_name_is_as_plain(name: str) -> None:
    with pytest.raises(BundleError, match=f"^scorers has the name '{name}': accepted is"):
        replace(STUDENT, scorers={name: STUDENT.scorers["own"]})


@pytest.mark.parametrize(
    "name",
    [
        *(f"latents.{part}" for part in ("height", "width", "channels", "packing", "frames")),
        *(f"image.{part}" for part in ("height", "width", "frames", "fps")),
        "max_tokens",
    ],
)
@pytest.mark.parametrize("value", [0, -2, 2.0, "2"])
def test_every_size_is_a_whole_number_of_1_or_more(name: str, value: Any) -> None:
    part, _, inner = name.partition(".")
    changed = replace(getattr(STUDENT, part), **{inner: value}) if inner else value
    with pytest.raises(BundleError, match="accepted are whole numbers of 1 or more$"):
        replace(STUDENT, **{part: changed})


def test_packing_must_divide_height_and_width() -> None:
    for side in ("height", "width"):
        with pytest.raises(BundleError, match=r"packing 2 must divide both$"):
            replace(STUDENT, latents=replace(STUDENT.latents, **{side: 5}))


def test_a_step_count_stands_once_and_has_its_own_list_of_sigmas() -> None:
    for steps, sigmas in (((2, 1, 2), STUDENT.sigmas), ((2,), STUDENT.sigmas), ((2, 1), {2: (1.0, 0.5)})):
        with pytest.raises(BundleError, match="accepted is one list of sigmas per step count$"):
            replace(STUDENT, steps=steps, sigmas=sigmas)
    for wrong in ((1.0, 1.0), (1.0, 0.0), (1.0,), (1.01, 0.5), (1.0, math.nan), (math.nan, 0.5)):
        with pytest.raises(BundleError, match=r"^sigmas\[2\] is .*: accepted are 2 decreasing values in \(0, 1\]$"):
            replace(STUDENT, sigmas={**STUDENT.sigmas, 2: wrong})


def test_a_number_that_json_has_not_is_never_written(tmp_path: Path) -> None:
    rewrite_student(tmp_path, STUDENT)
    before = (tmp_path / "student.json").read_bytes()
    spoilt = replace(STUDENT, evaluation=({"score": math.nan},))
    with pytest.raises(ValueError, match="Out of range float values"):
        rewrite_student(tmp_path, spoilt)
    assert (tmp_path / "student.json").read_bytes() == before
