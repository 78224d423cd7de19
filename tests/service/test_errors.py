"""The table of error codes has every code that the service can answer with, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from service.errors import CODES
from tests.documents.blocks import ROOT

SERVICE = ROOT / "service"


def used(tree: ast.AST) -> Iterator[str]:
    """The codes in a module: ``code="…"`` of a call, ``code = "…"`` of a class or module, and ``Failure("…", …)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            yield from _text(node.value)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "").lower() == "code" for t in node.targets):
            yield from _text(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Failure":
            yield from _text(node.args[0])


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_the_codes_of_a_module_are_found() -> None:
    text = "CODE = 'a'\nclass E:\n    code = 'b'\nf('x', code='c')\nFailure('d', 'm')\nother = 'e'\ng(code=CODE)\n"
    assert set(used(ast.parse(text))) == {"a", "b", "c", "d"}


def test_every_code_is_in_the_table_and_every_one_of_the_table_is_used() -> None:
    found = {code for path in SERVICE.rglob("*.py") for code in used(ast.parse(path.read_text("utf-8")))}
    for path in SERVICE.rglob("*.lua"):
        found |= set(re.findall(r"\bcode = '(\w+)'", path.read_text("utf-8")))
    assert found == set(CODES)


def test_every_code_has_an_error_status_and_says_what_it_means() -> None:
    for code, (status, meaning) in CODES.items():
        assert 400 <= status <= 599, code
        assert len(meaning) > 10 and not meaning.endswith(".") and not set("|\n") & set(meaning), code
