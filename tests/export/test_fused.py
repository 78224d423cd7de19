"""The fused graph itself: whole, shared, checked."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from student.bundle import read_student


@pytest.fixture(scope="module", params=[4, 2])
def steps(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def model(compiled: Path, steps: int) -> onnx.ModelProto:
    return onnx.load(compiled / "runtimes" / "onnx-fused-fp32" / f"{steps}-steps.onnx")


def test_it_passes_the_checker_and_shape_inference(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert len(inferred.graph.value_info) > 100


def test_inputs_and_output(model: onnx.ModelProto) -> None:
    values = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert values == {
        "clip_ids": ["batch", 20],
        "t5_ids": ["batch", 24],
        "noise": ["batch", 16, 8, 8],
        "images": ["batch", 3, 64, 64],
    }


def test_it_says_whose_it_is(model: onnx.ModelProto, compiled: Path, steps: int) -> None:
    student = read_student(compiled)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert metadata == {
        "student": "tiny 1",
        "source_sha256": student.fingerprint(),
        "steps": str(steps),
        "sigmas": " ".join(map(str, student.sigmas[steps])),
    }


def test_no_constant_is_there_twice(model: onnx.ModelProto) -> None:
    held = [(i.data_type, tuple(i.dims), onnx.numpy_helper.to_array(i).tobytes()) for i in model.graph.initializer]
    assert len(held) == len(set(held)) > 50


def test_all_steps_share_one_set_of_weights(compiled: Path, model: onnx.ModelProto) -> None:
    """What the graph holds is what the components hold, in half: no step has a copy."""
    held = sum(int(np.prod(i.dims)) for i in model.graph.initializer)
    weights = sum(p.stat().st_size for p in compiled.rglob("*.safetensors")) / 2
    encoder_of_pictures = 0.5 * (compiled / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size / 2
    assert held < weights - encoder_of_pictures * 0.7
    large = [i for i in model.graph.initializer if np.prod(i.dims) >= 1024]
    assert {i.data_type for i in large if "transformer" in i.name} == {onnx.TensorProto.FLOAT16}
