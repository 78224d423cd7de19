"""The table of docs/reliability.md: every row is written by the chaos run that measured it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEAD = ("#", "fault", "sent", "answered", "refused as it should", "executed twice", "lost", "wrong pictures", "seen")


@dataclass(frozen=True)
class Row:
    """What one fault did."""

    number: int
    fault: str
    sent: int
    answered: int
    refused: int
    twice: int
    lost: int
    wrong: int
    seen: str

    def cells(self) -> list[str]:
        figures = (self.sent, self.answered, self.refused, self.twice, self.lost, self.wrong)
        return [str(self.number), self.fault, *map(str, figures), self.seen]


def write(rows: list[Row], about: str) -> None:
    """Put rows into the document's table, in the place of what it held for the same faults."""
    text = DOCUMENT.read_text("utf-8")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    kept = [cells for cells in map(_cells, old.splitlines()) if len(cells) == len(HEAD) and cells[0].isdigit()]
    new = [row.cells() for row in rows]
    measured = {(cells[0], cells[1]) for cells in new}
    body = sorted(
        new + [cells for cells in kept if (cells[0], cells[1]) not in measured], key=lambda c: (int(c[0]), c[1])
    )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [list(HEAD), ["---"] * len(HEAD), *body])
    DOCUMENT.write_text(f"{before}{BEGIN}\n{about}\n\n{table}\n{END}{after}", "utf-8")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
