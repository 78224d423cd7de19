"""The fenced blocks of a document, and what the HTML comment above one says about running it.

    <!-- not run: needs a GPU -->      one of REASONS
    <!-- until stopped -->             a service: it runs in the background until the next one or the document's end
    <!-- file: my_rewards.py -->       the block is a file of that name
    <!-- run with: --dry-run -->       the option is added to each command
    <!-- run with: 200 => 8 -->        the text is replaced, so that it takes seconds

A shell or Python block without one is run as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CARDS = sorted((ROOT / "models").glob("*/README.md"))  # written by training; their blocks are for whoever has diffusers
REASONS = {
    "needs a GPU",
    "needs Docker",
    "needs Kubernetes",
    "needs the network",
    "needs root",
    "takes long",
    "needs your own model",
}
SHELL, PYTHON = "bash", "python"
OTHERS = {"console", "json", "mermaid", "text", "toml", "yaml"}  # shown, not run


def name_of(document: Path) -> str:
    """The path inside the repository: the id of a test."""
    return str(document.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """``line`` is that of the opening fence."""

    line: int
    language: str
    text: str
    marker: str

    @property
    def runs(self) -> bool:
        return self.language in (SHELL, PYTHON) and not self.marker.startswith("not run")

    @property
    def goes_on(self) -> bool:
        return self.marker == "until stopped"

    @property
    def file(self) -> str | None:
        return self.marker.partition("file: ")[2] or None

    @property
    def run_text(self) -> str:
        """What is run: the block, changed as its marker says."""
        change = self.marker.partition("run with: ")[2]
        if not change:
            return self.text
        old, arrow, new = change.partition(" => ")
        if arrow:
            assert old in self.text, f"line {self.line}: {old!r} is not in the block"
            return self.text.replace(old, new)
        return "".join(_with_option(command, change) + "\n" for command in _commands(self.text))


def _commands(text: str) -> list[str]:
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def _with_option(command: str, option: str) -> str:
    return re.sub(r"\s+# .*$", "", command) + f" {option}"


def blocks(document: Path) -> list[Block]:
    """Every fenced block of a document, in order."""
    found, opened, lines, comment = [], 0, list[str](), ""
    language = marker = ""
    for number, line in enumerate(document.read_text("utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if opened:
                found.append(Block(opened, language, "\n".join(lines) + "\n", marker))
                opened, lines, comment = 0, [], ""
            else:
                opened, language, marker = number, line[3:].strip(), comment
        elif opened:
            lines.append(line)
        elif match := re.fullmatch(r"<!-- (.+?) -->", line.strip()):
            comment = "" if match[1].endswith(": begin") else match[1]  # generated.py writes what follows
        elif line.strip():
            comment = ""
    assert not opened, f"{document.name}:{opened}: the block is never closed"
    return found
