"""The libraries that an export depends on."""

from importlib.metadata import version

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """Installed version of each."""
    return {library: version(library) for library in LIBRARIES}
