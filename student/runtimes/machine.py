"""Facts about this machine, found without a neural network library and without starting anything on a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from student.bundle import BundleError

CPU_INFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
AMX = frozenset({"amx_tile", "amx_bf16"})
# Instruction sets by which the libraries choose their kernels: with others, the last bits of a product may differ.
KERNELS = (
    "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
PACKAGES = {  # that bring a library, whichever of them is installed
    "onnx": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13-bindings"),
}
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # cuDeviceGetAttribute


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU that the driver reports."""

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str

    @property
    def slug(self) -> str:
        """The name as part of a folder's name: ``h100-80gb-hbm3``."""
        words = self.name.lower().removeprefix("nvidia ").split()
        return "-".join("".join(c for c in word if c.isalnum() or c == "-") for word in words)


def cpu_flags(info: Path = CPU_INFO) -> frozenset[str]:
    """The processor's instruction sets by Linux's names; empty on other systems."""
    try:
        lines = info.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in tiles (AMX), which makes bfloat16 worthwhile."""
    return cpu_flags() >= AMX


def free_bytes() -> int | None:
    """Free memory in bytes: the machine's, or the container's if that is less; None if it is unknown."""
    found = [value for value in (_machine(), _container()) if value is not None]
    return min(found) if found else None


def _machine() -> int | None:
    try:
        rows = dict(line.split(":", 1) for line in MEMINFO.read_text("ascii").splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _container() -> int | None:
    """What is left below the limit of a version 2 control group; 'max' means no limit."""
    try:
        limit = int((CGROUP / "memory.max").read_text("ascii"))
        return max(0, limit - int((CGROUP / "memory.current").read_text("ascii")))
    except (OSError, ValueError):
        return None


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU, or None and the reason why there is none."""
    try:
        cuda = ctypes.CDLL(ctypes.util.find_library("cuda") or "libcuda.so.1")
    except OSError:
        return None, "no NVIDIA driver is installed (libcuda.so.1 is missing)"
    if status := cuda.cuInit(0):
        return None, f"the NVIDIA driver does not start (cuInit returns {status})"
    count, version = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        return None, "the NVIDIA driver reports no GPU"
    cuda.cuDriverGetVersion(ctypes.byref(version))
    name, memory, number = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    capability = []
    for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
        capability.append(str(number.value))
    cuda.cuDeviceGetName(name, len(name), 0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), 0)
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode("utf-8", "replace"), ".".join(capability), memory.value, cuda_version), ""


def library_version(name: str) -> str:
    """The version of the library behind this kind of runtime, without importing it into this process."""
    for package in PACKAGES.get(name, ()):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def facts() -> dict[str, str]:
    """What a compiled engine depends on beside its library, by the names in a manifest's ``requires``."""
    gpu, _ = find_gpu()
    found = {"os": platform.system(), "arch": platform.machine()}
    if gpu is not None:
        found |= {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "cuda": gpu.cuda}
    return found


def machine_kind(runtime: str) -> str:
    """What the bits of a runtime's pictures may depend on beside its bundle, as a string.

    The processor's instruction sets, the GPU with its driver, and the library's version. Two machines of one kind give
    the same bits; two of different kinds may not.
    """
    library = runtime.partition("-")[0]
    gpu, _ = find_gpu()
    flags = cpu_flags()
    words = [platform.system(), platform.machine(), *(flag for flag in KERNELS if flag in flags)]
    if gpu is not None:
        words += [gpu.slug, f"cuda-{gpu.cuda}"]
    if library in PACKAGES:
        words += [f"{library}-{library_version(library)}"]
    return " ".join(words)


def check_machine(folder: Path, requires: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse a runtime that was compiled for another machine.

    Raises:
        BundleError: something differs; the message names the first.
    """
    for what, wanted in requires.items():
        here = found.get(what)
        if here != wanted:
            place = f"this machine has {here}" if here else "this machine has none"
            raise BundleError(f"{folder} was compiled for {what} {wanted}, and {place}: make it again with export.run")
