"""The rooms and who may enter which: read from the imports themselves, without running anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("student", "rewards", "training", "export", "service", "fewstep")
MAY_IMPORT: dict[str, set[str]] = {
    "student": set(),
    "rewards": set(),
    "training": {"student", "rewards"},
    "export": {"student", "rewards"},
    "service": {"student", "rewards"},
    "fewstep": {"student", "rewards", "training", "export", "service"},
}
# The processes of the service, which meet only in its queue, its results and its models. Nobody but the command that
# starts them knows of more than its own.
PROCESSES = {"http", "worker", "supervise"}
PARTS = sorted({path.stem for path in (ROOT / "service").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
               - {"run", "__init__"})  # fmt: skip
MOST_FLOORS = 7
TORCH = {"torch", "diffusers", "transformers"}
# what a worker imports for the ONNX or the fake runtime; student/runtimes/torch.py and what it needs are not among it
WITHOUT_TORCH = (
    "student/base.py",
    "student/bundle.py",
    "student/files.py",
    "student/noise.py",
    "student/schedule.py",
    "student/sampler.py",
    "student/prompts.py",
    "student/tokens.py",
    "student/reference.py",
    "student/writing.py",
    "student/runtimes/batches.py",
    "student/runtimes/buckets.py",
    "student/runtimes/compiled.py",
    "student/runtimes/experts.py",
    "student/runtimes/lengths.py",
    "student/runtimes/load.py",
    "student/runtimes/machine.py",
    "student/runtimes/manifest.py",
    "student/runtimes/onnx.py",
    "student/runtimes/openvino.py",
    "student/runtimes/options.py",
    "student/runtimes/resize.py",
    "student/runtimes/runtime.py",
    "student/runtimes/scoring.py",
    "student/runtimes/session.py",
    "student/runtimes/sizes.py",
    "student/runtimes/stages.py",
)


def imports(path: Path, anywhere: bool = True) -> set[str]:
    """Absolute module names that a file imports; with ``anywhere`` False only those that run at its own import."""
    tree = ast.parse(path.read_text("utf-8"), str(path))
    nodes = list(ast.walk(tree)) if anywhere else _at_import(tree)
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _at_import(tree: ast.Module) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        nodes.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue.extend(ast.iter_child_nodes(node))
    return nodes


def graph(*rooms: str) -> dict[str, set[str]]:
    """Each module of these rooms, and which others of them it imports."""
    paths = [path for room in rooms for path in sources(room) if path.name != "__init__.py"]
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    return {name: imports(path) & set(modules) - {name} for name, path in modules.items()}


def folders(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of the folders right inside a room; a file right inside one stands for itself."""
    found: dict[str, set[str]] = {}
    for name, others in modules.items():
        part = _part(name)
        found.setdefault(part, set()).update({_part(other) for other in others} - {part})
    return found


def _part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(edges: dict[str, set[str]]) -> list[str]:
    """A node of each circle: what is left when whatever imports nothing that is left is taken away, again and again."""
    left = {name: set(others) for name, others in edges.items()}
    while ground := [name for name, others in left.items() if not others & set(left)]:
        for name in ground:
            del left[name]
    return sorted(name for name in left if any(name in others for others in left.values()))


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_map_allows(room: str) -> None:
    for path in sources(room):
        others = top(imports(path)) & set(ROOMS) - {room}
        assert others <= MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {sorted(others - MAY_IMPORT[room])}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_service_imports_no_process_but_its_own(part: str) -> None:
    for path in sources(f"service/{part}") or [ROOT / "service" / f"{part}.py"]:
        inside = {name.split(".")[1] for name in imports(path) if name.startswith("service.")}
        assert not inside & PROCESSES - {part}, (
            f"{path.relative_to(ROOT)} imports {sorted(inside & PROCESSES - {part})}"
        )


def test_there_is_no_import_circle() -> None:
    """Neither between files, wherever in a file the import stands, nor between the folders of the service."""
    assert circles(graph(*ROOMS, "deploy", "benchmarks")) == []
    assert circles(folders(graph("service"))) == []


def test_the_service_has_few_floors() -> None:
    """A floor stands above all that it imports; the folders of the service are its rooms."""
    parts = folders(graph("service"))
    floor: dict[str, int] = {}

    def height(part: str) -> int:
        if part not in floor:
            floor[part] = 1 + max((height(under) for under in parts[part]), default=0)
        return floor[part]

    assert max(height(part) for part in parts) <= MOST_FLOORS


def test_a_command_imports_its_room_only_when_it_runs() -> None:
    for path in sources("fewstep"):
        early = top(imports(path, anywhere=False)) & {"training", "export", "service"}
        assert not early, f"{path.relative_to(ROOT)} imports {sorted(early)} at its own import"


def test_the_service_never_imports_torch() -> None:
    for path in sources("service"):
        assert not top(imports(path)) & TORCH, path.relative_to(ROOT)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_the_onnx_worker_imports_does_not_lead_to_torch(name: str) -> None:
    early = imports(ROOT / name, anywhere=False)
    assert not top(early) & TORCH
    inside = {module for module in early if module.startswith("student.")}
    files = {f"{module.replace('.', '/')}.py" for module in inside}
    assert {file for file in files if (ROOT / file).is_file()} <= set(WITHOUT_TORCH)


@pytest.mark.parametrize("module", ["student.runtimes.load", "service.run"])
def test_importing_it_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; print(sorted({TORCH!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_init_file_is_empty() -> None:
    """Every import cycle seen in other projects passes through one that is not. One is not: people write
    ``fewstep.Client``, so fewstep/__init__.py finds the client when it is asked for it."""
    inits = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("__init__.py")]
    assert len(inits) >= len(ROOMS)
    assert [path for path in inits if path.read_bytes()] == [ROOT / "fewstep" / "__init__.py"]


def test_the_one_init_file_that_is_not_empty_imports_nothing_of_its_own() -> None:
    tree = ast.parse((ROOT / "fewstep" / "__init__.py").read_text("utf-8"))
    run = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    module = ast.Module(run, [])
    modules = {node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "importlib", "typing"}
    assert not [node for node in ast.walk(module) if isinstance(node, ast.Import)]


CLIENT = ("client", "async_client", "protocol", "connection", "events", "retries", "request", "answers", "errors")


@pytest.mark.parametrize("name", CLIENT)
def test_the_client_imports_httpx_and_pydantic_and_nothing_else(name: str) -> None:
    found = top(imports(ROOT / "fewstep" / f"{name}.py"))
    assert found - set(sys.stdlib_module_names) <= {"fewstep", "httpx", "pydantic"}
    inside = {module for module in imports(ROOT / "fewstep" / f"{name}.py") if module.startswith("fewstep.")}
    assert {module.split(".")[1] for module in inside} <= set(CLIENT)


def test_every_package_folder_has_an_init_file() -> None:
    for room in ROOMS:
        folders = {path.parent for path in sources(room)}
        assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_these_tests_see_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert folders({"s.a.x": {"s.b.y", "s.a.z"}, "s.a.z": set(), "s.b.y": {"s.run"}, "s.run": set()}) == {
        "s.a": {"s.b"}, "s.b": {"s.run"}, "s.run": set(),
    }  # fmt: skip


def test_these_tests_see_a_forbidden_import(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from training.shapes import world\nimport torch.nn as nn\n")
    assert top(imports(path)) == {"training", "torch"}
    assert top(imports(path, anywhere=False)) == {"torch"}
