"""TensorRT's Python API on the host: a "plan" is JSON that names an ONNX file, and ONNX Runtime computes it.

It reads and writes the very addresses that it was given, and refuses as the real library does: by answering False
(and writing into its log), or None for a plan that does not open. What was asked is counted, for the tests.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

__version__ = "11.4.0"
COUNTS: Counter[str] = Counter()
REFUSED: list[str] = []


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DataType(enum.Enum):
    FLOAT = 0
    INT64 = 8


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


TYPES = {"tensor(float)": (DataType.FLOAT, np.float32), "tensor(int64)": (DataType.INT64, np.int64)}


def _refuse(why: str) -> bool:
    REFUSED.append(why)
    return False


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scratch_bytes = 0
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch_bytes = size if address else 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < self._engine.num_optimization_profiles:
            return _refuse(f"profile {profile}")
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            return _refuse(f"{name} has a shape before there is a profile")
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return _refuse(f"{name} of shape {shape} is outside of profile {self._profile}: {least} to {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.names or address % 16:
            return _refuse(f"address of {name}")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        COUNTS["launches"] += 1
        COUNTS[f"{engine.name} of {next(iter(self._shapes.values()), (0,))[0]}"] += 1
        if self._scratch_bytes < engine.device_memory_size_v2:
            return _refuse("too little working memory")
        for name in engine.names:
            if name not in self._addresses:
                return _refuse(f"{name} is not bound")
            if engine.get_tensor_mode(name) is TensorIOMode.INPUT and name not in self._shapes:
                return _refuse(f"{name} has no shape")
        feed = {name: self._view(name, self._shapes[name]).copy() for name in engine.inputs}
        for name, answer in zip(engine.outputs, engine.session.run(engine.outputs, feed), strict=True):
            self._view(name, answer.shape)[...] = answer
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._engine.numpy_type(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    """``batches``: (least, best, most) of each optimisation profile."""

    def __init__(self, name: str, path: Path, batches: list[list[int]]) -> None:
        self.name = name
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._nodes = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.names = [*self.inputs, *self.outputs]
        self._batches = batches
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(batches)
        self.device_memory_size_v2 = 1024

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._nodes[name].shape[1:])

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._nodes[name].type][0]

    def numpy_type(self, name: str) -> Any:
        return TYPES[self._nodes[name].type][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rest = tuple(self._nodes[name].shape[1:])
        return [(batch, *rest) for batch in self._batches[profile]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        COUNTS["contexts"] += 1
        return Context(self)


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        try:
            order = json.loads(plan)
            return Engine(order["name"], Path(order["onnx"]), order["batches"])
        except (ValueError, KeyError):
            REFUSED.append("plan")
            return None
