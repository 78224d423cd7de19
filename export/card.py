"""The table of runtimes in a student's model card: what each is, weighs, and how near it is to torch."""

from __future__ import annotations

from pathlib import Path

from export.compile import Outcome
from export.writing import write_atomically

TITLE = "## Runtimes"
HEAD = (
    "| runtime | size | made in | worst pixel, of 1 | PSNR | reward change (first scorer) |",
    "|---|---|---|---|---|---|",
)


def row_of(outcome: Outcome) -> str:
    """One line of the table."""
    manifest = outcome.manifest
    graphs = (*manifest.graphs.values(), *manifest.stages.values())
    files = [name for graph in graphs for name in (graph.file, graph.data) if name]
    size_mb = sum((outcome.folder / name).stat().st_size for name in files) / 1e6
    seconds = sum(row.seconds for row in outcome.made)
    return " | ".join((f"| {manifest.name}", f"{size_mb:.1f} MB", f"{seconds:.0f} s", *_parity(outcome))) + " |"


def _parity(outcome: Outcome) -> tuple[str, str, str]:
    parity = list(outcome.manifest.parity.values())
    if not parity:
        return "not proven", "-", "-"
    worst = max(value for one in parity for value in one.max_abs.values())
    psnr = min(one.psnr_db or 0.0 for one in parity)
    changes = [next(iter(one.reward.values())) for one in parity if one.reward]
    least = min(changes, key=lambda change: change.mean, default=None)
    reward = f"{least.mean:+.4f} ± {least.error:.4f} ({least.prompts} prompts)" if least else "-"
    return f"{worst:.1e}", f"{psnr:.0f} dB", reward


def update_card(bundle: Path, outcome: Outcome) -> None:
    """Put the runtime's line into the card's table; lines of runtimes that are gone are dropped."""
    card = bundle / "README.md"
    if not card.is_file() or not outcome.made:
        return
    text = card.read_text("utf-8")
    before, _, section = text.partition(f"\n{TITLE}\n")
    table, _, after = section.partition("\n## ")
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(HEAD[0][:11])]
    names = {line.split("|")[1].strip(): line for line in lines}
    names[outcome.manifest.name] = row_of(outcome)
    there = [names[name] for name in sorted(names) if (outcome.folder.parent / name).is_dir()]
    new = "\n".join((before.rstrip(), "", TITLE, "", *HEAD, *there)) + "\n"
    write_atomically(card, (new + (f"\n## {after}" if after else "")).encode())
