"""The model card of a student: its origin, its scores, and its runtimes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.compile import Outcome
from export.lora import Lora
from export.source import MULTISTEP, Source
from student.bundle import Student
from student.writing import write_atomically

TERMS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
RUNTIMES = "## Runtimes"
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
        return "not verified", "-", "-"
    worst = max(value for one in parity for value in one.max_abs.values())
    psnr = min(one.psnr_db or 0.0 for one in parity)
    changes = [next(iter(one.reward.values())) for one in parity if one.reward]
    least = min(changes, key=lambda change: change.mean, default=None)
    reward = f"{least.mean:+.4f} ± {least.error:.4f} ({least.prompts} prompts)" if least else "-"
    return f"{worst:.1e}", f"{psnr:.0f} dB", reward


def update_card(bundle: Path, outcome: Outcome) -> None:
    """Put the runtime's row into the card's table; rows of removed runtimes are dropped."""
    card = bundle / "README.md"
    if not card.is_file() or not outcome.made:
        return
    text = card.read_text("utf-8")
    before, _, section = text.partition(f"\n{RUNTIMES}\n")
    table, _, after = section.partition("\n## ")
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(HEAD[0][:11])]
    names = {line.split("|")[1].strip(): line for line in lines}
    names[outcome.manifest.name] = row_of(outcome)
    there = [names[name] for name in sorted(names) if (outcome.folder.parent / name).is_dir()]
    new = "\n".join((before.rstrip(), "", RUNTIMES, "", *HEAD, *there)) + "\n"
    write_atomically(card, (new + (f"\n## {after}" if after else "")).encode())


def licence(source: Source) -> str:
    """The licence as the source's own card names it."""
    front = front_matter(source.folder / "README.md")
    name = front.get("license_name") if front.get("license") == "other" else front.get("license")
    return name or front.get("license") or ("see LICENSE" if _terms(source) else "unknown")


def _terms(source: Source) -> bool:
    return any((source.folder / name).is_file() for name in TERMS)


def front_matter(readme: Path) -> Mapping[str, str]:
    """The plain ``key: value`` lines of a card's front matter."""
    if not readme.is_file():
        return {}
    found = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    lines = re.findall(r"^([A-Za-z_]+):[ \t]*(\S.*)$", found[1], re.MULTILINE) if found else []
    return {key: value.strip().strip("\"'") for key, value in lines}


def adopted_card(source: Source, loras: Sequence[Lora], student: Student) -> str:
    """A model card in the hub's form: origin, licence, and sampling."""
    front = front_matter(source.folder / "README.md")
    terms = {key: front[key] for key in ("license", "license_name", "license_link") if key in front}
    lines = ["---", *(f"{key}: {value}" for key, value in terms.items()), "library_name: diffusers"]
    lines += ["pipeline_tag: text-to-image" if student.image.frames is None else "pipeline_tag: text-to-video"]
    lines += [f"base_model: {source.base or source.name}", "tags:", "- fewstep", "---", "", f"# {student.id}", ""]
    lines += [f"{source.name}, adopted by fewstep without any training."]
    lines += [f"Everything but its transformer is that of {source.base}."] if source.base else []
    lines += [f"Merged into it: {lora.name}, weight {lora.weight:g}." for lora in loras]
    lines += [f"Licence: {licence(source)}, according to its authors' card; it applies to this copy too.", ""]
    if dict(source.index).get("scheduler", ("", ""))[1] == MULTISTEP:
        lines += ["Its UniPC steps are replaced by Euler steps at the same sigmas.", ""]
    lines += ["| steps | sigmas of its own scheduler |", "|---|---|"]
    sigmas = {steps: ", ".join(f"{sigma:.6g}" for sigma in student.sigmas[steps]) for steps in student.steps}
    lines += [f"| {steps} | {row} |" for steps, row in sigmas.items()]
    size = f"{student.image.width}x{student.image.height}"
    baked = ", ".join(f"{name} {value:g}" for name, value in student.baked.items()) or "no guidance"
    frames, fps = student.image.frames, student.image.fps
    length = "" if frames is None else f" and {frames} frame{'s' * (frames > 1)}, played at {fps} a second"
    lines += [
        "",
        f"It generates {size} pixels{length}, with {baked} and prompts of up to {student.max_tokens} tokens.",
        "",
    ]
    return "\n".join(lines)


def add_rewards_to_card(bundle: Path, student: Student) -> None:
    """Add the table of scores below the card's own text."""
    path = bundle / "README.md"
    if not path.is_file() or not student.scorers:
        return
    title = "## Rewards"
    before, _, rest = path.read_text("utf-8").partition(f"\n{title}\n")
    after = rest.partition("\n## ")[2]
    rows = [
        f"| {name} | {scorer.reward or scorer.file} | {scorer.mean:.5g} | {scorer.std:.4g} |"
        for name, scorer in student.scorers.items()
    ]
    head = ["| scorer | reward | raw mean on its own pictures (0) | standard deviation (1) |", "|---|---|---|---|"]
    text = "\n".join([before.rstrip(), "", title, "", *head, *rows]) + "\n" + (f"\n## {after}" if after else "")
    write_atomically(path, text.encode())
