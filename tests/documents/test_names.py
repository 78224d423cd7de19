"""Whatever a document names exists: files, functions, links, make targets, modules and settings."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote

import pytest

from service.settings import OF_CLIENTS, PREFIX, SECRETS_DIR, Settings
from tests.documents.blocks import CARDS, DOCUMENTS, ROOT, name_of
from tests.documents.generated import PARTS, written
from training.rats.config import RatsConfig

ROOMS = "service|student|rewards|training|export|fewstep|deploy|benchmarks|models|tests|docs|requirements"
FUNCTION = re.compile(rf"`((?:{ROOMS})/[\w/.-]+\.(?:py|lua)):([\w.]+)`")
FILE = re.compile(rf"`((?:{ROOMS})/[\w/.-]*\w/?)`")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
BY_NAME = pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS], ids=name_of)


def defined(path: Path) -> set[str]:
    """``function``, ``Class``, ``Class.method`` and ``CONSTANT`` of a file; of a Lua script, its functions."""
    if path.suffix == ".lua":
        return set(re.findall(r"^local function (\w+)", path.read_text("utf-8"), flags=re.MULTILINE))
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        names |= _names(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return names


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@BY_NAME
def test_the_functions_that_a_document_names_exist(document: Path) -> None:
    for file, name in FUNCTION.findall(document.read_text("utf-8")):
        assert (ROOT / file).is_file(), f"{document.name}: there is no {file}"
        assert name in defined(ROOT / file), f"{document.name}: {file} has no {name}"


@BY_NAME
def test_the_files_that_a_document_names_exist(document: Path) -> None:
    for name in FILE.findall(document.read_text("utf-8")):
        if "NAME" in name:  # a place for the reader's own
            continue
        assert (ROOT / name).exists(), f"{document.name}: there is no {name}"


@BY_NAME
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text("utf-8")):
        name, _, anchor = unquote(link).partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


@BY_NAME
def test_the_commands_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for run in re.findall(r"(?<![\w])make ((?:[a-z]+(?:-[a-z]+)*\b ?)+)", " ".join(_code(text))):
        assert set(run.split()[:1]) <= targets, f"{document.name}: make {run}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, f"{document.name}: python -m {module}"


def _code(text: str) -> list[str]:
    """What stands in backticks or in a fenced block."""
    return re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)


@BY_NAME
def test_the_settings_that_a_document_names_exist(document: Path) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OF_CLIENTS | {SECRETS_DIR, "FEWSTEP_PUBLISH"}
    named = set(re.findall(rf"{PREFIX}[A-Z0-9_]*[A-Z0-9]", document.read_text("utf-8")))
    assert named <= known, f"{document.name}: {sorted(named - known)}"


@BY_NAME
def test_the_training_settings_that_a_document_names_exist(document: Path) -> None:
    known = _keys(RatsConfig)
    for key in re.findall(r"--set ([a-z][\w.]*)=", document.read_text("utf-8")):
        assert key in known or key == "key", f"{document.name}: --set {key}"


def _keys(config: Any) -> set[str]:
    types = get_type_hints(config)
    nested = {name for name in types if is_dataclass(types[name])}
    return {*types} - nested | {f"{name}.{key}" for name in nested for key in _keys(types[name])}


@pytest.mark.parametrize(("file", "name"), PARTS)
def test_what_a_document_takes_from_the_code_is_up_to_date(file: str, name: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert written(text, name, PARTS[file, name]()) == text, "run make docs"


def test_names_that_do_not_exist_are_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("LIMIT: int = 3\nclass A:\n    def b(self): ...\nasync def c(): ...\n")
    assert defined(module) == {"LIMIT", "A", "A.b", "c"}
    page = tmp_path / "page.md"
    page.write_text("# One step, of FLUX.1\n`service/a.py:b`, `service/lua/`, [x](page.md#one) and `training/`\n")
    assert anchors(page) == {"one-step-of-flux1"}
    assert FUNCTION.findall(page.read_text()) == [("service/a.py", "b")]
    assert FILE.findall(page.read_text()) == ["service/lua/"]
    assert LINK.findall(page.read_text()) == ["page.md#one"]
