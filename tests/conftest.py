"""Students to test with; torch is imported only by the tests that ask for one."""

import os
from pathlib import Path

import pytest

# pytest-xdist gives its processes a width of their own, which a console of rich would keep for ever.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="All rows of the fault matrix, larger, with their table.")
    parser.addoption("--chaos-seed", type=int, default=1, help="What the chaos runs' random choices follow from.")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random student that serves through torch; its scorers lie in ``tiny-scorers``. Not to be written to."""
    from tests import tiny

    models = tmp_path_factory.mktemp("models")
    tiny.build(models / "tiny", tiny.scorers(models / "tiny-scorers"))
    return models / "tiny"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student with its fused ONNX runtime and scorers, made by the export command. Not to be written to."""
    from export.run import run
    from tests import tiny

    models = tmp_path_factory.mktemp("compiled")
    tiny.build(models / "tiny", tiny.scorers(models / "tiny-scorers"))
    run(student=models / "tiny", to="onnx", form="fused")
    return models / "tiny"
