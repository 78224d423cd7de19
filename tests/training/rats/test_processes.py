"""Two real processes on gloo against one process that accumulates twice as much."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.student.families import tiny
from tests.training.rats.test_families import settings
from tests.training.shapes import small
from training.steplog import read_log

SEVERAL = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(processes: int, out: Path, arguments: list[str]) -> None:
    environment = {
        **os.environ,
        "HOME": str(out.parent / f"home-{processes}"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    several = [*SEVERAL, str(processes), "-m"]
    command = [
        sys.executable,
        *(several if processes > 1 else ["-m"]),
        "tests.training.rats.ended",
        "--out",
        str(out),
        *arguments,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("rats ") == 1, "one bar is shown, not one for each process"


LORA = {"lora_rank": 2, "tau_in_spreads": "true", "batch": 1}


@pytest.mark.parametrize(
    ("gradient", "shard", "more"),
    [
        ("full", False, {}),
        ("detached", False, LORA),
        ("full", True, {}),
        ("detached", True, {**LORA, "weights": "bf16"}),
    ],
)
def test_two_processes_are_one_with_twice_the_accumulation(
    gradient: str, shard: bool, more: dict[str, object], tmp_path: Path
) -> None:
    shared = {"gradient": gradient, "validate_every": 3, "alpha": 2.0, **more}
    launch(1, tmp_path / "one", settings(tmp_path, "flux", accumulate=2, **shared))
    launch(2, tmp_path / "two", settings(tmp_path, "flux", accumulate=1, shard=str(shard).lower(), **shared))
    one, two = (read_log(tmp_path / name / "run" / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    looked = [name for name in one[0] if name not in ("step", "elapsed_s")]
    assert len(looked) >= 5 and [one[0][name] for name in looked] == [two[0][name] for name in looked]
    for a, b in zip(one[1:], two[1:], strict=True):
        # Adam's first steps divide by gradients near 0: what differs in the last bit then differs by more.
        close = 1e-5 if a["step"] == 0 else 1e-2
        for name in ("loss", "grad_norm", "reward_student", "gap", "gap_std", "shaping"):
            assert a[name] == pytest.approx(b[name], rel=close, abs=1e-6), (a["step"], name)
    weights = [load_file(next((tmp_path / name / "transformer").glob("*.safetensors"))) for name in ("one", "two")]
    assert all(torch.allclose(value, weights[1][name], atol=2e-3) for name, value in weights[0].items())


@pytest.mark.parametrize("kind", ["spread", "tuned"])
def test_two_processes_train_two_experts_as_one_process_does(kind: str, tmp_path: Path) -> None:
    """Spread: slices of experts that some backward calls leave out. Tuned: each process calls an expert of its own."""
    shared = {"validate_every": 3, **({**LORA, "gradient": "detached"} if kind == "spread" else {"batch": 1})}
    way = ["--tune"] if kind == "tuned" else []
    launch(1, tmp_path / "one", [*way, *settings(tmp_path, "wan_14b", accumulate=2, **shared)])
    launch(2, tmp_path / "two", [*way, *settings(tmp_path, "wan_14b", shard=str(kind == "spread").lower(), **shared)])
    one, two = (read_log(tmp_path / name / "run" / "log.jsonl") for name in ("one", "two"))
    for a, b in zip(one[1:], two[1:], strict=True):
        close = 1e-3 if a["step"] == 0 else 1e-2  # a gap in spreads is the difference of two that are nearly the same
        assert all(a[name] == pytest.approx(b[name], rel=close, abs=1e-6) for name in ("loss", "grad_norm")), a["step"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_network_spread_over_two_processes_learns_saves_and_ends_like_a_whole_one(kind: str, tmp_path: Path) -> None:
    small.write_models(tmp_path)
    command = [
        sys.executable,
        *SEVERAL,
        "2",
        "-m",
        "tests.training.rats.sharded",
        str(tmp_path / "shapes-teacher"),
        kind,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_killed_processes_are_gone_on_with_by_one_and_by_four(tmp_path: Path) -> None:
    """Every tensor of a checkpoint, of all weights or of adapters, comes back bit for bit, however many share it."""
    small.write_models(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}

    def started(processes: int, run_dir: Path, what: str) -> subprocess.CompletedProcess[str]:
        several = [*SEVERAL, str(processes), "-m"] if processes > 1 else ["-m"]
        arguments = [str(tmp_path / "shapes-teacher"), str(run_dir), what]
        command = [sys.executable, *several, "tests.training.rats.resharded", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    killed = started(2, tmp_path / "two", "killed")
    assert killed.returncode != 0 and (tmp_path / "two" / "lora" / "killed.pt").exists(), killed.stderr[-3000:]
    for processes in (1, 4):
        copy = tmp_path / f"on-{processes}"
        shutil.copytree(tmp_path / "two", copy)
        done = started(processes, copy, "on")
        assert done.returncode == 0, done.stderr[-3000:]
        for kind in ("full", "offload", "lora", *tiny.MAKERS):
            assert not (copy / kind / "checkpoint.part").exists() and (copy / kind / "checkpoint").is_dir()


CLAIMS = """
import sys, time
from pathlib import Path
from training import rundir
from training.config import to_json
from training.processes import Processes, process_group
from training.rats.config import RatsConfig

processes, out = Processes(), Path(sys.argv[1])
write_text = Path.write_text

def slow(path, text):
    time.sleep(2)
    return write_text(path, text)

Path.write_text = slow
processes.wait()
if not processes.is_first:
    time.sleep(1)
with process_group():
    rundir.claim_together(processes, out / "run", RatsConfig(seed=1), out)
assert (out / "run" / rundir.CONFIG).read_text() == to_json(RatsConfig(seed=1)) + "\\n"
"""


def test_a_directory_that_the_first_process_is_making_is_not_taken_for_anothers(tmp_path: Path) -> None:
    """The disk is slow: between the directory and the configuration in it the second process looks."""
    (tmp_path / "claims.py").write_text(CLAIMS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, *SEVERAL, "2", str(tmp_path / "claims.py"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


VOTES = """
from training.processes import Processes, process_group

processes = Processes()
with process_group():
    first = processes.is_first
    assert processes.any(first, False, not first, True) == (True, False, True, True)
    assert (processes.agree(True), processes.agree(first), processes.agree(not first)) == (True, False, False)
"""


def test_one_process_that_is_asked_to_stop_is_enough_and_all_hear_of_it(tmp_path: Path) -> None:
    (tmp_path / "votes.py").write_text(VOTES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, *SEVERAL, "2", str(tmp_path / "votes.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
