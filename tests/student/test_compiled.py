"""What a compiled runtime makes of its graphs, whichever library runs them: which are called, how often, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from student.bundle import ImageSize, Student
from student.runtimes.buckets import Bucket
from student.runtimes.compiled import CompiledRuntime, SteppedRuntime, cpu_batch
from student.runtimes.lengths import compiled_lengths
from student.runtimes.runtime import CpuSharing
from student.runtimes.stages import StagedGraphs
from tests import tiny

PICTURE = tiny.student({})
VIDEO = replace(PICTURE, latents=replace(PICTURE.latents, frames=2), image=ImageSize(64, 64, 5, 16))
OWN, OTHER = (64, 64), (32, 96)


class Noted:
    """Graphs of which a picture is its seed, size by name; notes each call, and may have other bits in some batches."""

    def __init__(self, name: str, other_bits: Sequence[int] = (), sharing: CpuSharing | None = None) -> None:
        self.name, self.other_bits, self.sharing = name, other_bits, sharing
        self.calls: list[tuple[list[str], list[int], int, bool]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        crowded = self.sharing is not None and self.sharing.crowded
        self.calls.append((list(prompts), list(seeds), steps, crowded))
        images = np.array(seeds, np.float32).reshape(-1, 1, 1, 1) + steps
        return np.nextafter(images, np.float32(2e9)) if len(seeds) in self.other_bits else images

    def sizes(self, steps: int | None = None, crowded: bool | None = None) -> set[int]:
        return {
            len(seeds) for _, seeds, made, busy in self.calls
            if steps in (None, made) and crowded in (None, busy)
        }  # fmt: skip


def runtime(student: Student, graphs: Noted, others: dict[Bucket, Any] | None = None, **more: Any) -> CompiledRuntime:
    return CompiledRuntime(Path("nowhere"), student, 1, "onnx", graphs, others or {}, **more)  # type: ignore[arg-type]


def test_the_largest_batch_is_8_on_a_cpu_and_1_for_videos_of_any_length() -> None:
    one_frame = replace(PICTURE, latents=replace(PICTURE.latents, frames=1), image=ImageSize(64, 64, 1, 16))
    assert [cpu_batch(student) for student in (PICTURE, one_frame, VIDEO)] == [8, 8, 1]
    assert runtime(PICTURE, Noted("own"), {Bucket(OTHER): Noted("other")}).max_batch == 8
    assert runtime(one_frame, Noted("own"), {Bucket(OWN, 9): Noted("longer")}).max_batch == 1
    assert runtime(VIDEO, Noted("own"), max_batch=3).max_batch == 3


def test_every_batch_size_of_every_graph_is_warmed_up_at_every_step_count() -> None:
    own, other = Noted("own"), Noted("other")
    found = runtime(PICTURE, own, {Bucket(OTHER): other})
    for graphs in (own, other):
        for steps in PICTURE.steps:
            assert graphs.sizes(steps) == set(range(1, 9))
    assert found.together == tuple(range(1, 9)) and found.batches_are_independent


def test_a_batch_size_goes_together_only_if_it_does_at_every_size() -> None:
    found = runtime(PICTURE, Noted("own", (3,)), {Bucket(OTHER): Noted("other", (2, 8))})
    assert found.together == (1, 4, 5, 6, 7) and not found.batches_are_independent


def test_a_call_is_split_and_keeps_its_order() -> None:
    graphs = Noted("own", (3, 5, 6, 7, 8))
    found = runtime(PICTURE, graphs)
    graphs.calls.clear()
    prompts, seeds = [f"p{k}" for k in range(7)], list(range(100, 107))
    images = found.draw(prompts, seeds, 2)
    np.testing.assert_array_equal(images.ravel(), np.arange(102, 109))
    parts = (slice(0, 4), slice(4, 6), slice(6, 7))
    assert graphs.calls == [(prompts[part], seeds[part], 2, False) for part in parts]


@pytest.mark.parametrize("threads_matter", [False, True])
def test_a_share_of_the_threads_is_tried_too_and_given_up_if_it_changes_a_picture(threads_matter: bool) -> None:
    sharing = CpuSharing()
    graphs = Noted("own", sharing=sharing)
    draw = graphs.draw

    def other_bits(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
        images = draw(prompts, seeds, steps)
        changed = len(seeds) == (6 if not sharing.crowded else 1 if threads_matter else 4)
        return np.nextafter(images, np.float32(2e9)) if changed else images

    graphs.draw = other_bits  # type: ignore[method-assign]
    found = runtime(PICTURE, graphs, cpu_sharing=sharing)
    assert graphs.sizes(2, crowded=True) == set(range(1, 9)) == graphs.sizes(4, crowded=True)
    assert (sharing.allowed, sharing.crowded) == (not threads_matter, False) and found.cpu_sharing is sharing
    assert found.together == ((1, 2, 3, 4, 5, 7, 8) if threads_matter else (1, 2, 3, 5, 7, 8))


def test_a_size_or_length_has_its_own_graphs_and_others_are_refused() -> None:
    buckets = {
        Bucket(OWN, 9): "9 frames",
        Bucket(OTHER): "other",
        Bucket(OTHER, 9): "other of 9",
        Bucket((8, 8), 9): "small",
    }
    others = {bucket: Noted(name) for bucket, name in buckets.items()}
    own = Noted("own")
    found = runtime(VIDEO, own, dict(others))
    assert found.sizes == (OWN, OTHER, (8, 8))
    assert found.lengths == {
        OWN: compiled_lengths((5, 9)),
        OTHER: compiled_lengths((5, 9)),
        (8, 8): compiled_lengths((9,)),
    }
    every = {Bucket(OWN): own, **others}
    for size, frames, bucket in (
        (None, None, Bucket(OWN)), (OWN, 5, Bucket(OWN)), (None, 9, Bucket(OWN, 9)), (OTHER, None, Bucket(OTHER)),
        (OTHER, 5, Bucket(OTHER)), (OTHER, 9, Bucket(OTHER, 9)), ((8, 8), 9, Bucket((8, 8), 9)),
    ):  # fmt: skip
        for graphs in every.values():
            graphs.calls.clear()
        found.draw(["a"], [3], 2, size, frames)
        assert [key for key, graphs in every.items() if graphs.calls] == [bucket], (size, frames)
    with pytest.raises(ValueError, match=r"^tiny generates 64x64, 96x32 or 8x8 pixels and no other size\.$"):
        found.draw(["a"], [3], 2, (96, 32))
    with pytest.raises(ValueError, match="^frames is 13: tiny was compiled for 5, 9 at 96x32$"):
        found.draw(["a"], [3], 2, OTHER, 13)
    with pytest.raises(ValueError, match="^frames is 5: tiny was compiled for 9 at 8x8$"):
        found.draw(["a"], [3], 2, (8, 8))
    pictures = runtime(PICTURE, Noted("own"))
    assert pictures.lengths == {} and pictures.sizes == (OWN,)
    with pytest.raises(ValueError, match="^frames is 9: tiny was compiled for images only$"):
        pictures.draw(["a"], [3], 2, None, 9)


class Staged(StagedGraphs):
    """Stages without a graph; ``other_bits`` as for ``Noted``, unless the calls are split."""

    def __init__(self, other_bits: Sequence[int] = ()) -> None:
        self.noted, self.together = Noted("staged", other_bits), ()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Any = None) -> Any:
        if watch is not None:
            watch(0, lambda rows: None)
        return self.noted.draw(prompts, seeds, steps)


def test_the_stages_are_told_which_rows_may_go_together_unless_all_may() -> None:
    for bits, expected in (((), ()), ((3,), (1, 2, 4, 5, 6, 7, 8))):
        own, other = Staged(bits), Staged()
        found = SteppedRuntime(Path("nowhere"), PICTURE, 1, "onnx", own, {Bucket(OTHER): other})
        assert own.together == other.together == expected
        assert own.noted.sizes(2) == set(range(1, 9)) == own.noted.sizes(4)
        own.noted.calls.clear()
        found.draw(["a", "b", "c"], [1, 2, 3], 4)
        assert own.noted.sizes() == {3}, "in one call: the stages themselves are split"


def test_a_staged_runtime_is_checked_and_watched_at_every_size() -> None:
    own, other, seen = Staged(), Staged(), list[int]()
    found = SteppedRuntime(Path("nowhere"), PICTURE, 1, "onnx", own, {Bucket(OTHER): other})
    other.noted.calls.clear()
    found.draw_watched(["a"], [1], 4, lambda step, preview: seen.append(step), OTHER)
    assert seen == [0] and other.noted.sizes() == {1}
    for draw in (found.draw, lambda *call: found.draw_watched(*call, lambda step, preview: None)):
        for call, message in (
            ((["a"], [1, 2], 4), "accepted is one seed for each prompt"),
            ((["a"] * 9, range(9), 4), "the batch has 9 images: accepted is 1 to 8"),
            ((["a"], [1], 3), "steps is 3: tiny was trained for 4, 2"),
        ):
            with pytest.raises(ValueError, match=message):
                draw(*call)  # type: ignore[arg-type]


def test_a_watched_stage_shows_what_is_predicted_in_each_step_but_the_last(bundle: Path) -> None:
    """The answer key is the loop by hand: v = 2 x + sigma of one expert, 3 x of the other; a picture is its latents."""
    from student.bundle import read_student

    student = replace(read_student(bundle), steps=(3,), sigmas={3: (1.0, 0.5, 0.25)})
    calls: list[tuple[str, list[str], dict[str, Any]]] = []

    def open_(path: Path) -> Any:
        def run(names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
            calls.append((path.name, list(names), feed))
            if path.name == "text":
                return [np.full((len(feed["t5_ids"]), 1), k, np.float32) for k in range(len(names))]
            if path.name == "decoder":
                return [feed["latents"]]
            sigma = feed["sigma"][:, None, None, None]
            return [2 * feed["latents"] + sigma if path.name == "step" else 3 * feed["latents"]]

        return SimpleNamespace(run=run)

    files = {name: Path(name) for name in ("text", "step", "step_2", "decoder")}
    graphs = StagedGraphs(bundle, student, files, open_, boundary=0.4)
    assert graphs.stages == ("text", "step", "step_2", "decoder")
    from student.noise import noise

    x = noise([5, 6], student.latents.shape)
    expected, predicted = x, []
    for sigma, following in ((1.0, 0.5), (0.5, 0.25), (0.25, 0.0)):
        v = 2 * expected + np.float32(sigma) if sigma >= 0.4 else 3 * expected
        predicted.append(expected - np.float32(sigma) * v)
        expected = expected + v * np.float32(following - sigma)
    shown: list[tuple[int, Any]] = []
    images = graphs.draw(["a", "b"], [5, 6], 3, lambda i, preview: shown.append((i, preview([1]))))
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
    assert [i for i, _ in shown] == [0, 1]
    for i, picture in shown:
        np.testing.assert_allclose(picture, predicted[i][1:], rtol=1e-5, atol=1e-5)
    steps = [(name, feed) for name, _, feed in calls if name.startswith("step")]
    assert [name for name, _ in steps] == ["step", "step", "step_2"]
    for name, feed in steps:
        assert feed.keys() == {"latents", "sigma", "tokens", "pooled"} and feed["sigma"].dtype == np.float32, name
        assert (feed["tokens"][0, 0], feed["pooled"][0, 0]) == (0, 1)
    graphs.together = (1,)
    calls.clear()
    np.testing.assert_array_equal(graphs.draw(["a", "b"], [5, 6], 3), images)
    assert {len(next(iter(feed.values()))) for _, _, feed in calls} == {1} and len(calls) == 2 * 5


def test_text_is_placed_once_on_the_device_of_the_steps(bundle: Path) -> None:
    from student.bundle import read_student

    student, placed, fed = read_student(bundle), list[Any](), list[Any]()

    def session(name: str, has_place: bool) -> Any:
        def run(names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
            if name.startswith("step"):
                fed.append(feed["tokens"])
            return [feed.get("latents", np.zeros((1, 1), np.float32)) for _ in names]

        def place(array: Any) -> Any:
            placed.append(array)
            return ("placed", array)

        return SimpleNamespace(run=run, **({"place": place} if has_place else {}))

    def graphs(step: bool, step_2: bool) -> StagedGraphs:
        there = {"text": True, "step": step, "step_2": step_2, "decoder": True}
        files = {name: Path(name) for name in there}
        return StagedGraphs(bundle, student, files, lambda path: session(path.name, there[path.name]), boundary=0.6)

    graphs(True, True).draw(["a"], [1], 4)
    assert len(placed) == 2 and {one[0] for one in fed} == {"placed"}, "tokens and pooled, once for all steps"
    for step, step_2, together in ((True, False, ()), (False, True, ()), (True, True, (1,))):
        placed.clear()
        fed.clear()
        made = graphs(step, step_2)
        made.together = together
        made.draw(["a"], [1], 4)
        assert not placed and all(isinstance(one, np.ndarray) for one in fed)


def test_a_share_of_the_threads_is_given_up_if_it_changes_a_picture_of_another_size() -> None:
    sharing = CpuSharing()
    other = Noted("other", sharing=sharing)
    draw = other.draw
    other.draw = lambda prompts, seeds, steps: draw(prompts, seeds, steps) + sharing.crowded  # type: ignore[method-assign]
    runtime(PICTURE, Noted("own"), {Bucket(OTHER): other}, cpu_sharing=sharing)
    assert not sharing.allowed and not sharing.crowded
    steady = CpuSharing()
    runtime(PICTURE, Noted("own"), {Bucket(OTHER): Noted("other")}, cpu_sharing=steady)
    assert steady.allowed
