"""Which device, which type, and where the prompt encoders wait: from the files and the machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from student.bundle import BundleError
from student.families.find import family_of
from student.runtimes.machine import Gpu
from student.runtimes.placement import Placement, numbers_of, place
from student.runtimes.torch import TorchModel, move_parts
from tests.student.families import tiny

GIB = 2**30
FLUX = {"transformer": 11_901_408_320, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}
WAN_14B = {
    "transformer": 14_288_901_184, "transformer_2": 14_288_901_184, "text_encoder": 5_680_910_336, "vae": 126_892_531
}  # fmt: skip
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
        (WAN_14B, gpu(80), "auto", Placement("cuda", "bfloat16", "off")),
        (WAN_14B, gpu(64), "auto", Placement("cuda", "bfloat16", "cpu")),
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


def just_enough(bytes_: int) -> Gpu:
    """The smallest GPU of whose memory 92 per cent are so many bytes."""
    memory = next(m for m in range(int(bytes_ / 0.92) - 3, int(bytes_ / 0.92) + 4) if int(m * 0.92) >= bytes_)
    return Gpu("NVIDIA X", "9.0", memory, "13.0")


NETWORK = 10**9
PARTS = {"transformer": NETWORK, "vae": 10**8, "text_encoder": 2 * 10**9, "text_encoder_2": 3 * 10**8}
ROOM = 3 * 10**9  # for activations


@pytest.mark.parametrize(
    ("offload", "needed"),
    [
        ("off", 2 * (NETWORK + 10**8 + 2 * 10**9 + 3 * 10**8) + ROOM),
        ("encoders", 2 * (NETWORK + 10**8 + 2 * 10**9 + 3 * 10**8)),  # more than the network while it draws
        ("cpu", 2 * (NETWORK + 10**8) + ROOM),
    ],
)
def test_a_way_is_taken_from_the_byte_on_that_it_needs(offload: str, needed: int) -> None:
    """What is asked for is refused with its own need, what is chosen with the least of all."""
    held = 10**9
    assert place(PARTS, just_enough(needed), offload, activations=ROOM).offload == offload
    assert place(PARTS, just_enough(needed), activations=ROOM).offload == offload
    assert place(PARTS, just_enough(needed + held), offload, activations=ROOM, scorers=held).offload == offload
    with pytest.raises(BundleError, match=rf"needs {needed / 2**30:.1f} GiB of GPU memory in bfloat16"):
        place(PARTS, just_enough(needed - 2), offload, activations=ROOM)
    with pytest.raises(BundleError, match=rf"needs {needed / 2**30:.1f} GiB of GPU memory in bfloat16"):
        place(PARTS, just_enough(needed + held - 2), offload, activations=ROOM, scorers=held)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("7.0", "float16"),
        ("7.5", "float16"),
        ("8.0", "bfloat16"),
        ("8", "bfloat16"),
        ("8.9", "bfloat16"),
        ("12.0", "bfloat16"),
    ],
)
def test_bfloat16_is_for_gpus_that_have_it_and_for_networks_that_need_less_memory(capability: str, dtype: str) -> None:
    """float16's narrow range is not for an autoencoder, which then counts in float32."""
    numbers = {"transformer": 200_000_000, "vae": 4 * 10**9}
    assert place(numbers, gpu(80, capability)).dtype == dtype
    assert place({**numbers, "transformer": 199_999_999}, gpu(80, capability)).dtype == "float32"
    vae = (4 if dtype == "float16" else 2) * 4 * 10**9
    with pytest.raises(
        BundleError, match=rf"needs {(vae + 4 * 10**8 + 2 * GIB) / GIB:.1f} GiB of GPU memory in {dtype}"
    ):
        place(numbers, gpu(1, capability))


def test_what_scorers_hold_is_not_there_for_the_network() -> None:
    assert place(FLUX, gpu(40)).offload == "off"
    assert place(FLUX, gpu(40), scorers=4 * GIB).offload == "encoders"
    with pytest.raises(BundleError, match=r"only 21\.8 GiB available beside the 4\.0 GiB of its scorers"):
        place(FLUX, gpu(28), scorers=4 * GIB)


def test_both_experts_of_wan_2_2_14b_must_fit() -> None:
    with pytest.raises(BundleError, match=r"needs 55\.5 GiB of GPU memory in bfloat16"):
        place(WAN_14B, gpu(48))


@pytest.mark.parametrize("name", tiny.MAKERS)
@pytest.mark.parametrize("offload", ["off", "cpu"])
def test_every_part_moves_but_encoders_that_stay(name: str, offload: str) -> None:
    family = family_of(tiny.MAKERS[name]())
    move_parts(family, Placement("meta", "float32", offload))
    where = {key.partition(".")[0]: value.device.type for key, value in family.named_parameters()}
    kept = set(family.encoders) if offload == "cpu" else set()
    assert where == {part: "cpu" if part in kept else "meta" for part, _ in family.named_children()}
    assert len(where) == len(family.encoders) + (3 if name == "wan_14b" else 2)


def test_both_experts_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    family, compiled = family_of(tiny.wan_14b()), []
    monkeypatch.setattr(nn.Module, "compile", lambda part, **options: compiled.append((part, options["mode"])))
    TorchModel(family, Placement("cpu", "float32"), "on")
    assert compiled == [(family.transformer, "default"), (family.transformer_2, "default")]


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


def test_weights_in_several_files_count_as_in_one(bundle: Path, tmp_path: Path) -> None:
    from student.pipeline import open_pipeline

    pipe = open_pipeline(bundle)
    pipe.save_pretrained(tmp_path / "one")
    pipe.save_pretrained(tmp_path / "several", max_shard_size="100KB")
    assert len(list((tmp_path / "several" / "transformer").glob("*.safetensors"))) > 1
    assert numbers_of(tmp_path / "several") == numbers_of(tmp_path / "one")
