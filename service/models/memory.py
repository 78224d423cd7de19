"""Whether a student fits into the free memory: an estimate that is made before loading, as a process that runs out of
memory is killed together with everything it serves."""

from __future__ import annotations

from pathlib import Path

from student.base import pipeline_folder
from student.bundle import BundleError, Student
from student.runtimes.machine import free_bytes

# Twice its files, for the runtime's own copies, and room to compute: the starter student (14 MB of ONNX files) was
# measured at 91 MB after a batch of 8.
GROWTH = 2
ROOM_BYTES = 64 * 2**20
WEIGHTS = {".onnx", ".data", ".safetensors", ".engine", ".plan", ".bin"}


def check_memory(bundle: Path, student: Student, runtime: str, limit_bytes: int, held_bytes: int) -> int:
    """The estimated bytes that loading this student needs.

    ``limit_bytes`` is what all students of a process may use together (0: the machine's memory), ``held_bytes`` what
    is in use already.

    Raises:
        BundleError: they are not available.
    """
    needed = needed_bytes(bundle, runtime)
    if limit_bytes and held_bytes + needed > limit_bytes:
        raise BundleError(
            f"it needs about {_mb(needed)} MB of memory, but only {_mb(max(0, limit_bytes - held_bytes))} MB of the "
            f"{_mb(limit_bytes)} MB of FEWSTEP_MODEL_MEMORY_MB are left"
        )
    free = free_bytes()
    if free is not None and needed > free:
        raise BundleError(f"it needs about {_mb(needed)} MB of memory, but only {_mb(free)} MB are free")
    return needed


def needed_bytes(bundle: Path, runtime: str) -> int:
    """An estimate of a student's memory, from the sizes of the files that its runtime reads.

    Weights of a pipeline are often stored in half the precision in which torch computes on a CPU.
    """
    kinds = {"onnx" if name == "auto" else name.split("-")[0] for name in runtime.split(",")}
    compiled = [folder for folder in (bundle / "runtimes").glob("*") if folder.name.split("-")[0] in kinds]
    scorers = _weights(bundle / "scorers")
    if compiled:
        return ROOM_BYTES + GROWTH * (max(_weights(folder) for folder in compiled) + scorers)
    pipeline = pipeline_folder(bundle)
    parts = [folder for folder in pipeline.iterdir() if folder.is_dir() and folder.name not in ("runtimes", "scorers")]
    return ROOM_BYTES + GROWTH * (2 * sum(_weights(part) for part in parts) + scorers)


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in WEIGHTS and path.is_file())


def _mb(size_bytes: int) -> int:
    return -(-size_bytes // 2**20)
