from pathlib import Path

import pytest

from student.bundle import Scorer
from tests import tiny

SCORERS = {
    "trained": Scorer(file="scorers/trained.onnx", source_sha256="ab" * 32, mean=0.5, std=2.0, role="trained"),
    "heldout": Scorer(file="scorers/heldout.onnx", source_sha256="cd" * 32, mean=-1.0, std=0.5, role="heldout"),
}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student without compiled runtimes; not to be written to."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.build(path, SCORERS)
    return path
