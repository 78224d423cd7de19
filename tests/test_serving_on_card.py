"""The torch runtime as it opens and serves on a GPU of limited memory: FLUX.2 klein at full published size on a device
that is not there."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPModel

from benchmarks.make_believe import DEVICE, Peak, fake_device, kernels, put, unread
from benchmarks.published import CASES
from benchmarks.serving_memory import placed, whole
from benchmarks.train_step import words
from rewards.clip import ClipReward
from rewards.hps import vit_h_14
from rewards.interface import scored
from student.bundle import BundleError, ImageSize, Scorer, Student
from student.families.family import Family
from student.runtimes import torch as module
from student.runtimes.batches import DOUBLING, FILE, measure
from student.runtimes.machine import Gpu
from student.runtimes.manifest import RUNTIMES
from student.runtimes.options import Options
from student.runtimes.placement import ACTIVATIONS, USABLE, Placement, place
from student.runtimes.runtime import FloatArray
from student.runtimes.scoring import OpenReward, ScoreFn
from student.runtimes.sizes import size_name
from student.runtimes.torch import TorchRuntime
from tests.alone import alone
from tests.student.families import tiny

KLEIN = next(case for case in CASES if case.name == "FLUX.2 klein 4B")
PARTS, SIZE = ("transformer", "vae", "text_encoder"), (1024, 1024)
GIB = 2**30
HPS = Scorer("scorers/hps.onnx", 0.0, 1.0, "heldout", reward="hpsv2.1")

pytestmark = alone


class Ids:
    """In place of the tokenizers: ids of the published lengths."""

    def __init__(self, *_: object) -> None:
        pass

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
        return tuple(np.ones((len(prompts), length), np.int64) for length in KLEIN.ids)


@dataclass
class Card:
    """A GPU of so much memory; ``decoded`` has how many pictures each call of the decoder had, ``most`` the bytes that
    were alive in the last."""

    gib: float
    mode: FakeTensorMode
    peak: Peak
    student: Student
    bundle: Path
    decoded: list[int] = field(default_factory=list)
    most: int = 0

    @property
    def usable(self) -> int:
        return int(self.gib * GIB * USABLE)

    def serve(self, open_reward: OpenReward | None = None, **options: str) -> TorchRuntime:
        return TorchRuntime(self.bundle, self.student, 1, Options(open_reward, **options))

    def family(self, offload: str) -> Family:
        """Klein with its weights on the card, where the offload lets them be there."""
        family = placed(KLEIN, offload, self.mode)
        for part in PARTS:
            self.peak.hold(getattr(family, part))
        decode = family.decode

        def counted(x: Tensor) -> Tensor:
            self.decoded.append(len(x))
            self.peak.restart()
            images = decode(x)
            self.most = self.peak.most
            return images

        family.decode = counted  # type: ignore[method-assign]
        return family

    def reward(self, _: str) -> ScoreFn:
        """HPS v2.1's network in float32, which waits on the card."""
        with torch.device("meta"):
            clip = CLIPModel(vit_h_14()).requires_grad_(False).eval()
        put(clip, self.mode, torch.float32)
        self.peak.hold(clip)
        reward = ClipReward(clip, words, fit="pad")

        def score(images_BCHW: FloatArray, prompts: Sequence[str]) -> FloatArray:
            images = torch.ones(images_BCHW.shape)
            with torch.no_grad():
                raw_B: FloatArray = scored("hpsv2.1", reward, images, prompts, DEVICE).cpu().numpy()
            return raw_B

        return score


@contextlib.contextmanager
def card(bundle: Path, gib: float, scorers: dict[str, Scorer] | None = None) -> Iterator[Card]:
    family = whole(KLEIN)
    student = tiny.manifest(family, (2, 1), family.geometry(1024, 1024), ImageSize(1024, 1024))
    student = replace(student, scorers=scorers or {})
    numbers = {name: sum(value.numel() for value in getattr(family, name).parameters()) for name in PARTS}
    limit = int(gib * GIB * USABLE)
    with fake_device() as mode, unread(), kernels(), Peak(limit=limit) as peak, pytest.MonkeyPatch.context() as patch:
        found = Card(gib, mode, peak, student, bundle)
        patch.setattr(module, "read_index", lambda _: {"_class_name": "Flux2KleinPipeline"})
        patch.setattr(module, "numbers_of", lambda _: numbers)
        patch.setattr(module, "find_gpu", lambda: (Gpu("NVIDIA X", "9.0", int(gib * GIB), "13.0"), ""))
        patch.setattr(module, "PromptTokens", Ids)
        patch.setattr(module, "place", lambda *arguments: replace(place(*arguments), device=DEVICE))
        patch.setattr(module, "_open", lambda _, __, placement, ___: found.family(placement.offload))
        # A call takes no time here but this computer's own: memory alone is to end the doubling.
        patch.setattr(module, "measure", functools.partial(measure, clock=itertools.count().__next__))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
        patch.setattr(torch.cuda, "mem_get_info", lambda: (limit - peak.now, int(gib * GIB)))
        yield found


# These two come before the fixture below: its card counts what lies on any other from then on.
def test_scorers_on_the_card_are_there_before_its_batches_are_measured(tmp_path: Path) -> None:
    """Else the largest batch would be four, and take the memory that they need."""
    with card(tmp_path, 24, {"hps": HPS}) as gpu:
        runtime = gpu.serve(gpu.reward)
        resident = gpu.peak.now
        images = runtime.draw(["a"], [1], 2)
        scores = runtime.score(images, ["a"])
        assert runtime.scorers.names == ("hps",) and scores["hps"].shape == (1,) and np.isfinite(scores["hps"]).all()
        assert runtime.max_batch == largest(gpu, resident) == 2


def test_a_card_without_room_beside_the_scorers_is_refused(tmp_path: Path) -> None:
    with card(tmp_path, 12, {"hps": HPS}) as gpu, pytest.raises(BundleError, match="beside the 3.7 GiB of its scorers"):
        gpu.serve(gpu.reward)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Card, TorchRuntime]]:
    """A card on which two pictures in one call fit, and four do not."""
    with card(tmp_path_factory.mktemp("card"), 20.5) as gpu:
        yield gpu, gpu.serve()


def largest(gpu: Card, resident: int) -> int:
    """What fits beside ``resident`` bytes, if each picture takes what the last one took."""
    assert gpu.decoded[-1] == 1
    return max(size for size in DOUBLING if resident + size * (gpu.most - resident) <= gpu.usable)


def test_the_largest_batch_is_what_the_memory_allows(served: tuple[Card, TorchRuntime]) -> None:
    gpu, runtime = served
    resident = gpu.peak.now
    assert runtime.placement == Placement(DEVICE, "bfloat16", "off")
    images = runtime.draw(["one"], [1], 2)
    assert images.shape == (1, 3, 1024, 1024) and images.dtype == np.float32
    assert runtime.max_batch == largest(gpu, resident) == 2 and runtime.batches[SIZE].together == (1, 2)
    assert gpu.peak.now == resident, "nothing is left, not even of the batch that ran out of memory"
    assert max(size for size in DOUBLING if resident + size * ACTIVATIONS <= gpu.usable) <= 2, "as the placement counts"
    (kept,) = json.loads((gpu.bundle / RUNTIMES / FILE).read_text()).values()
    assert kept[size_name(SIZE)]["largest"] == 2


def test_whoever_watches_gets_pictures_of_every_step(served: tuple[Card, TorchRuntime]) -> None:
    gpu, runtime = served
    seen = list[tuple[int, tuple[int, ...]]]()
    gpu.decoded.clear()
    images = runtime.draw_watched(
        ["a", "b"], [1, 2], 2, lambda step, pictures: seen.append((step, pictures([1]).shape))
    )
    assert seen == [(0, (1, 3, 1024, 1024))] and gpu.decoded == [1, 2] and images.shape == (2, 3, 1024, 1024)


def test_a_size_that_was_not_measured_is_drawn_one_by_one(served: tuple[Card, TorchRuntime]) -> None:
    gpu, runtime = served
    gpu.decoded.clear()
    assert runtime.draw(["a", "b"], [1, 2], 1, (1280, 768)).shape == (2, 3, 1280, 768) and gpu.decoded == [1, 1]
