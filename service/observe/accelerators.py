"""Which GPUs there are and what they say of themselves, by NVIDIA's management library; without it, nothing."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
MILLI = 1000

log = logging.getLogger(__name__)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that a process started here may use, each as CUDA_VISIBLE_DEVICES names it; empty without any.

    What is already chosen there (indices, UUIDs or MIG instances) is followed; else they are all of the machine.
    """
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return tuple(_open()[1])
    names = [name.strip() for name in chosen.split(",")]
    return tuple(names[: names.index("-1")] if "-1" in names else [name for name in names if name])


class Accelerators:
    """The GPUs that this process can see. One that stops answering is no longer reported."""

    def __init__(self) -> None:
        self._library, devices = _open()
        chosen = [name for name in os.environ.get(VISIBLE, "").split(",") if name.startswith("GPU-")]
        self._devices = {uuid: devices[uuid] for uuid in devices if not chosen or uuid.startswith(tuple(chosen))}

    def measure(self) -> dict[str, dict[str, float]]:
        """By the GPU's UUID: its busy share (0 to 1), memory in bytes, watts, degrees Celsius."""
        found = {}
        for uuid, device in self._devices.items():
            try:
                found[uuid] = self._state(device)
            except self._library.NVMLError as error:
                log.debug("GPU %s does not answer: %s", uuid, error)
        return found

    def _state(self, device: Any) -> dict[str, float]:
        nvml = self._library
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        return {
            "busy": nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
            "used_bytes": memory.used,
            "total_bytes": memory.total,
            "power_w": nvml.nvmlDeviceGetPowerUsage(device) / MILLI,
            "temperature_c": nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
        }


def _open() -> tuple[Any, Mapping[str, Any]]:
    """(the library, its devices by UUID); without the package, the library or a driver there are no devices."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, {}
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return nvml, {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    except nvml.NVMLError as error:
        log.debug("no GPU is reported: %s", error)
        return nvml, {}
