"""Every command and program that a document shows does what it says, in a copy of the repository."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.blocks import DOCUMENTS, OTHERS, PYTHON, REASONS, ROOT, SHELL, Block, blocks, name_of

MARKERS = ("not run: ", "until stopped", "file: ", "run with: ")
LIMIT_S = 600  # some install what they serve with
HERE = "127.0.0.1:8000"
PRELUDE = """set -eEuo pipefail
shopt -s expand_aliases
trap 'echo "line $BLOCK: $BASH_COMMAND" >&2' ERR
SERVICE=
stop() { if [ -n "$SERVICE" ]; then kill "$SERVICE"; wait "$SERVICE" || true; SERVICE=; fi; }
trap stop EXIT
ready() { until curl -s "$FEWSTEP_URL/readyz" >/dev/null; do kill -0 "$SERVICE"; sleep 0.2; done; }
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it would be committed, with environments that look installed."""
    folder = tmp_path_factory.mktemp("clone") / "fewstep"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for environment in (".venv", ".venv-serve"):
        programs = folder / environment / "bin"
        programs.mkdir(parents=True)
        _script(programs / "python", f'exec {sys.executable} "$@"')
        for program in ("accelerate", "tensorboard", "ruff", "mypy"):
            _script(programs / program, f'exec {Path(sys.executable).with_name(program)} "$@"')
        (folder / environment / ".installed").touch()
    tools = folder / ".venv" / "tools"
    tools.mkdir()
    _script(tools / "curl", f'exec {shutil.which("curl")} --fail-with-body "$@"')  # an answer that is refused fails
    _script(tools / "fewstep", f'exec {sys.executable} -m fewstep "$@"')
    return folder


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _script_of(found: list[Block], port: int) -> str:
    """One shell session, as if the document's blocks were pasted one after the other."""
    parts = [PRELUDE]
    for block in found:
        if not block.runs:
            continue
        text = block.run_text.replace(HERE, f"127.0.0.1:{port}")
        parts.append(f"BLOCK={block.line}\n")
        if block.file:
            parts.append(f"cat >'{block.file}' <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\n")
        elif block.language == PYTHON:
            parts.append(f".venv/bin/python - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\n")
        elif block.goes_on:
            parts.append(f"stop\n{text.rstrip()} &\nSERVICE=$!\nready\n")
        else:
            parts.append(text)
    return "".join(parts)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_blocks_of_a_document_run(document: Path, copy: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl") if not os.environ.get("CI") else pytest.fail("there is no curl")
    port, out = _free_port(), tmp_path / "output"
    script = tmp_path / "script"
    script.write_text(_script_of(blocks(document), port))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    environ = kept | {
        "PATH": f"{copy / '.venv' / 'tools'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "FEWSTEP_PORT": str(port),
        "FEWSTEP_URL": f"http://127.0.0.1:{port}",
        "FEWSTEP_DATA_DIR": str(tmp_path / "data"),
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with out.open("w") as sink:
        session = subprocess.Popen(
            ["bash", str(script)], cwd=copy, env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = session.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(session.pid, signal.SIGTERM)
            code = session.wait(30)
    assert code == 0, f"{document.name}: {out.read_text('utf-8', 'replace')[-3000:]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_block_is_left_out_without_a_reason(document: Path) -> None:
    for block in blocks(document):
        where = f"{document.name}:{block.line}"
        assert block.language in {SHELL, PYTHON, *OTHERS}, f"{where}: {block.language or 'no language'}"
        assert not block.marker or block.marker.startswith(MARKERS), f"{where}: {block.marker}"
        if block.marker.startswith("not run: "):
            assert block.marker.removeprefix("not run: ") in REASONS, f"{where}: {block.marker}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_a_page_starts_with_a_command(page: Path) -> None:
    """At its top, so that a reader can try what the page is about at once; so it is one that is run here."""
    first = blocks(page)[0]
    assert first.language == SHELL and first.line <= 4 and first.runs


def test_a_block_is_run_as_its_marker_says(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "<!-- run with: --dry-run -->\n\n```bash\na \\\n  --b   # why\nc\n```\n\n"
        "<!-- file: x.py -->\nwords\n```python\npass\n```\n"
        "<!-- run with: 200 => 8 -->\n```bash\nbench 200\n```\n"
        "<!-- not run: needs a GPU -->\n```bash\nd\n```\n"
        "<!-- states: begin -->\n```mermaid\ne\n```\n<!-- states: end -->\n"
    )
    options, unmarked, smaller, left_out, generated = blocks(document)
    assert options.run_text == "a --b --dry-run\nc --dry-run\n" and options.line == 3
    assert unmarked.marker == "" and unmarked.runs and unmarked.file is None
    assert smaller.run_text == "bench 8\n"
    assert not left_out.runs
    assert generated.marker == "" and not generated.runs


def test_a_block_that_fails_is_found_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("```bash\nalias no=false\n```\n```bash\ntrue\nno\n```\n")
    script = tmp_path / "script"
    script.write_text(_script_of(blocks(document), 1))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "line 4: false" in done.stderr
