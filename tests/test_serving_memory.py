"""The torch runtime at full published size on a device that is not there: nothing lies elsewhere, types are kept, and
what it holds is what docs/models.md says and what the placement counts on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import serving_memory
from benchmarks.make_believe import DEVICE, fake_device, kernels, put, unread
from benchmarks.published import CASES, Case
from benchmarks.serving_memory import GB, Row, opened, table
from student.families.family import Condition
from student.runtimes.placement import ACTIVATIONS
from tests.alone import alone

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {case.name: case for case in CASES}
MEDIUM = BY_NAME["Stable Diffusion 3.5 medium"]
OFFLOADS = {  # every published model; the script does all three offloads of each
    MEDIUM.name: ("off", "encoders", "cpu"),
    "FLUX.1-dev": ("off",),
    "FLUX.1-schnell": ("encoders",),
    "FLUX.2 klein 4B": ("cpu",),
    "Qwen-Image": ("encoders",),
    "Z-Image": ("off",),
    "Wan 2.1 1.3B": ("off",),
    "Wan 2.2 5B": ("encoders",),
    "Wan 2.2 14B": ("cpu",),
}
# Parameters of the encoders, as the headers of the published files have them.
ENCODERS = {
    "FLUX.1-dev": (123_060_480, 4_762_310_656),
    "Stable Diffusion 3.5 medium": (123_650_304, 694_659_840, 4_762_310_656),
    "FLUX.2 klein 4B": (4_022_468_096,),
    "Qwen-Image": (8_292_166_656,),
    "Z-Image": (4_022_468_096,),
    "Wan 2.1 1.3B": (5_680_910_336,),
}

pytestmark = alone


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoders_are_of_the_published_size(name: str) -> None:
    with torch.device("meta"):
        made = [make() for make in BY_NAME[name].encoders]
    assert tuple(sum(p.numel() for p in encoder.parameters()) for encoder in made) == ENCODERS[name]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Every published model, measured in a process of its own."""
    program = (
        "import json, sys; from benchmarks.published import CASES; from benchmarks.serving_memory import measure; "
        "asked = json.loads(sys.argv[1]); "
        "rows = [measure(case, asked[case.name], () if case.frames > 1 else (4,)) for case in CASES]; "
        "print(json.dumps([[row.case.name, row.weights, row.peak, row.together] for row in rows])); "
        "sys.stdout.flush(); import os; os._exit(0)"
    )
    command = [sys.executable, "-c", program, json.dumps(OFFLOADS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Row(BY_NAME[name], *counted) for name, *counted in json.loads(done.stdout)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_lies_on_the_device_is_what_the_offload_says(rows: dict[str, Row], case: Case) -> None:
    row = rows[case.name]
    activations = max(ACTIVATIONS, case.model.family.decoder_bytes_px * case.height * case.width)
    encoders, drawing = row.weights["encoders"], row.weights["transformer"] + row.weights["autoencoder"]
    for offload in OFFLOADS[case.name]:
        resident = drawing + (encoders if offload == "off" else 0)
        while_encoding = resident + (encoders if offload == "encoders" else 0)
        assert while_encoding <= row.peak[offload]["encode"] <= while_encoding + ACTIVATIONS
        for stage in ("draw", "decode"):
            assert resident < row.peak[offload][stage] <= resident + activations, "the placement leaves so much"


@pytest.mark.parametrize("case", [case for case in CASES if case.frames == 1], ids=lambda case: case.name)
def test_four_pictures_in_one_call_take_four_times_what_the_placement_leaves_for_one(
    rows: dict[str, Row], case: Case
) -> None:
    row, offload = rows[case.name], OFFLOADS[case.name][-1]
    one, four = row.peak[offload], row.together["4"]  # type: ignore[index]
    activations = max(ACTIVATIONS, case.model.family.decoder_bytes_px * case.height * case.width)
    resident = row.weights["transformer"] + row.weights["autoencoder"]
    resident += row.weights["encoders"] if offload == "off" else 0
    for stage in ("draw", "decode"):
        assert one[stage] < four[stage] <= resident + 4 * activations
    assert four["decode"] - resident == pytest.approx(4 * (one["decode"] - resident), rel=0.02), "each takes the same"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_document_says_what_is_measured(rows: dict[str, Row], case: Case) -> None:
    row = rows[case.name]
    document = (ROOT / "docs" / "models.md").read_text("utf-8")
    (line,) = (line for line in document.splitlines() if line.startswith(f"| {case.name}, {case.size} |"))
    said = line.strip("| ").split(" | ")
    wanted = [f"{row.weights[part] / GB:.1f}" for part in ("encoders", "transformer", "autoencoder")]
    assert said[1:4] == wanted, "run python -m benchmarks.serving_memory --write"
    for offload in row.peak:
        most = said[4 + ("off", "encoders", "cpu").index(offload)]
        assert most.rpartition("**")[0].endswith(f"**{row.most(offload) / GB:.1f}")
    if len(row.peak) == 3:
        assert serving_memory.line(row) == line


def test_both_experts_lie_on_the_device(rows: dict[str, Row]) -> None:
    """As many parameters as the published indexes of weights say, twice, in bf16."""
    assert rows["Wan 2.2 14B"].weights["transformer"] == pytest.approx(2 * 2 * 14_288_901_184, rel=1e-4)


def test_an_expert_that_lies_elsewhere_is_noticed() -> None:
    with fake_device() as mode, unread(), kernels(), torch.no_grad():
        family = opened(BY_NAME["Wan 2.2 14B"], "cpu", mode).family
        put(family.transformer_2, mode, torch.bfloat16, "cpu")
        x, condition = torch.ones(1, *family.latent_shape(64, 64)), Condition(torch.ones(1, 512, 4096, device=DEVICE))
        first, second = family.experts()
        assert first.velocity(x.to(DEVICE), 0.5, condition).shape == x.shape
        with pytest.raises(RuntimeError, match=f"(?s)(device.*{DEVICE}|{DEVICE}.*device)"):
            second.velocity(x.to(DEVICE), 0.5, condition)


def test_a_part_that_lies_elsewhere_is_noticed() -> None:
    """The encoders are left in main memory although the placement says that they are on the device."""
    with fake_device() as mode, unread(), kernels():
        model = opened(MEDIUM, "off", mode)
        put(model.family.text_encoder_3, mode, torch.bfloat16, "cpu")
        ids_BL = [torch.ones(1, length, dtype=torch.int64) for length in MEDIUM.ids]
        with pytest.raises(RuntimeError, match=f"(?s)(device.*{DEVICE}|{DEVICE}.*device)"):
            model.encode(ids_BL)


def test_attention_of_two_types_is_noticed() -> None:
    q = torch.ones(1, 2, 4, 8)
    with kernels(), pytest.raises(RuntimeError, match="attention of torch.float32, torch.bfloat16"):
        torch.nn.functional.scaled_dot_product_attention(q, q.bfloat16(), q)


def test_the_table_is_in_gb() -> None:
    peak = {offload: {"encode": 3 * GB, "draw": 2 * GB, "decode": 1 * GB} for offload in ("off", "encoders", "cpu")}
    row = Row(MEDIUM, {"encoders": 1 * GB, "transformer": 0.5 * GB, "autoencoder": 0.25 * GB}, peak)  # type: ignore[arg-type]
    said = "| Stable Diffusion 3.5 medium, 1024x1024 | 1.0 | 0.5 | 0.2 | 3.0, 2.0, 1.0: **3.0** | **3.0** | **3.0** |"
    assert said in table([row], {"weights": 4 * 10**9, "peak": 4 * 10**9})
