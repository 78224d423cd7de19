"""Which device, which type, and where the prompt encoders wait: from the files and the machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from student.bundle import BundleError
from student.runtimes.machine import Gpu
from student.runtimes.placement import Placement, numbers_of, place

GIB = 2**30
FLUX = {"transformer": 11_901_408_320, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}
STARTER = {"transformer": 3_000_000, "text_encoder": 100_000, "vae": 200_000}


def gpu(gib: float, capability: str = "9.0") -> Gpu:
    return Gpu("NVIDIA X", capability, int(gib * GIB), "13.0")


@pytest.mark.parametrize(
    ("numbers", "card", "offload", "expected"),
    [
        (FLUX, None, "auto", Placement("cpu", "float32", "off")),
        (FLUX, gpu(80), "auto", Placement("cuda", "bfloat16", "off")),
        (FLUX, gpu(80), "encoders", Placement("cuda", "bfloat16", "encoders")),
        (FLUX, gpu(35), "auto", Placement("cuda", "bfloat16", "encoders")),
        (FLUX, gpu(28), "auto", Placement("cuda", "bfloat16", "cpu")),
        (FLUX, gpu(80, "7.5"), "auto", Placement("cuda", "float16", "off")),
        (STARTER, gpu(8), "auto", Placement("cuda", "float32", "off")),
    ],
)
def test_the_placement_follows_from_files_and_machine(
    numbers: dict[str, int], card: Gpu | None, offload: str, expected: Placement
) -> None:
    assert place(numbers, card, offload) == expected


def test_a_gpu_that_is_too_small_is_refused_with_the_figures() -> None:
    sentence = r"needs 24\.3 GiB of GPU memory in bfloat16, but NVIDIA X has only 22\.1 GiB available"
    with pytest.raises(BundleError, match=sentence):
        place(FLUX, gpu(24))
    with pytest.raises(BundleError, match="needs 33.4 GiB"):
        place(FLUX, gpu(35), "off")
    with pytest.raises(BundleError, match="offload is 'disk': accepted are auto, off, encoders, cpu"):
        place(FLUX, gpu(80), "disk")


def test_a_video_that_takes_more_to_decode_is_given_more_room() -> None:
    numbers = {"transformer": 1_400_000_000, "text_encoder": 5_700_000_000, "vae": 127_000_000}
    assert (
        place(numbers, gpu(20)).offload == "off" and place(numbers, gpu(20), activations=8 * GIB).offload == "encoders"
    )
    with pytest.raises(BundleError, match="needs 14.8 GiB"):
        place(numbers, gpu(14), activations=12 * GIB)


def test_parts_that_stay_in_float32_are_counted_so() -> None:
    heavy = {"transformer": 1_000_000_000, "vae": 4_000_000_000}
    assert place(heavy, gpu(16)).dtype == "bfloat16"
    with pytest.raises(BundleError, match="GiB of GPU memory"):
        place(heavy, gpu(16), in_float32=("vae",))


def test_numbers_are_those_of_the_bundles_own_files(bundle: Path) -> None:
    from student.pipeline import open_pipeline

    pipe = open_pipeline(bundle)
    for part, count in numbers_of(bundle).items():
        state = getattr(pipe, part).state_dict()
        assert count >= sum(value.numel() for value in state.values()) * 0.9 and count > 0
