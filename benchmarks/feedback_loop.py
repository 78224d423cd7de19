"""The loop from served prompts to the next student, in the starter world: traffic, its log, and what retraining gains.

python -m benchmarks.feedback_loop narrow       writes prompts without stars and hearts, for a student with a weakness
python -m benchmarks.feedback_loop traffic      serves a student, asks as users do, exports the log (minutes)
python -m benchmarks.feedback_loop compare      the served student against the retrained, paired by prompt and seed
python -m benchmarks.feedback_loop compare --write "feedback loop"    also into docs/reward-serving.md
python -m benchmarks.feedback_loop picture      what both students draw for stars and hearts, to docs/feedback_loop.png

``traffic`` writes into the folder: feedback.jsonl (the prompts whose pictures ranked low), mixed.jsonl (these and the
others, for --set data.prompts), even.jsonl (all of them without a rank) and measuring.txt (for --set data.measuring).
``compare`` needs the retrained student's bundle, compiled. Errors are standard errors clustered by prompt: several
pictures of one prompt count as one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.best_of import Array, Estimate, estimate, table
from benchmarks.fleet_load import started_service
from benchmarks.serving.engine import BUNDLE, REPOSITORY
from benchmarks.serving.report import write_between
from fewstep.async_client import AsyncClient
from fewstep.client import Client
from service.quality.feedback import lines
from student.reference import verdicts
from student.runtimes.load import load
from student.runtimes.runtime import Runtime
from training.prompts import read
from training.shapes.grammar import COLORS, SHAPES, parse
from training.shapes.judge import judge_batch
from training.shapes.prompts import asked_prompts, fresh_prompts, measuring_prompts

FOLDER = REPOSITORY / "out" / "loop"
DOCUMENT = REPOSITORY / "docs" / "reward-serving.md"
USERS = 16
LOW = 20.0  # the service's FEWSTEP_FEEDBACK_PERCENTILE
TRAFFIC, FRESH, OTHERS, LOGGED = 8_000, 3_000, 600, 300
TRAFFIC_KEY, FRESH_KEY = (20261205, 1), (20261206,)
NARROW, NARROW_KEY, UNSEEN = 6_000, (20261207,), ("star", "heart")
TRAINED, STEPS = "trained", (4, 1, 2, 8)
MEASURES = {"right": "judge: right", "but shape": "right but shape", "heldout": "held-out", "trained": "trained"}
FIRST_SEED, SELECTING_SEED, PRIME = 40_000_000, 50_000_000, 7_919

Values = dict[str, Array]  # by measure: values_PS of P prompts and S seeds


@dataclass(frozen=True)
class Group:
    """Prompts that are compared, and how many seeds each of them has."""

    name: str
    prompts: Sequence[str]
    seeds: int


@dataclass(frozen=True)
class Row:
    """One measure of one group: both students' means, and the difference."""

    measure: str
    shipped: Estimate
    retrained: Estimate
    gain: Estimate

    @property
    def errors(self) -> float:
        """The gain in its own standard errors."""
        return self.gain.mean / self.gain.error if self.gain.error else 0.0


async def ask(url: str, prompts: Sequence[str]) -> None:
    """Ask for each prompt once, with consent, ``USERS`` at a time; prompt i has seed i."""
    waiting = iter(enumerate(prompts))
    async with AsyncClient(url) as client:

        async def user() -> None:
            for seed, prompt in waiting:
                await client.generate(prompt, seed=seed, allow_training=True)

        await asyncio.gather(*(user() for _ in range(USERS)))


def narrow(folder: Path) -> None:
    """The prompts of a student that has never been trained on some shapes, and the prompts to evaluate on."""
    asked = dict.fromkeys(asked_prompts(5 * NARROW, *NARROW_KEY))
    kept = [prompt for prompt in asked if not unseen(prompt)][:NARROW]
    _write(folder / "narrow.txt", kept)
    _write(folder / "measuring.txt", [prompt for part in measuring_prompts() for prompt in part])


def unseen(prompt: str) -> bool:
    """Whether a prompt asks for a shape that the narrow student was not trained on."""
    return any(thing.shape in UNSEEN for thing in parse(prompt).things)


def _write(file: Path, prompts: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{prompt}\n" for prompt in prompts), "utf-8")


def traffic(requests: int, folder: Path, bundle: Path) -> None:
    """Serve a student, ask, and write the files that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = asked_prompts(requests, *TRAFFIC_KEY)
    # One key may fill a tenth of the log, and here all requests are of one.
    os.environ.update(FEWSTEP_FEEDBACK_MAX=str(10 * requests), FEWSTEP_FEEDBACK_PERCENTILE=str(LOW))
    os.environ["FEWSTEP_MODEL"] = str(bundle.resolve())
    with started_service() as url:
        asyncio.run(ask(url, asked))
        with Client(url) as service:
            kept = service.operate("GET", "admin/feedback")["data"]
    low = {row["prompt"] for row in kept}
    others = [{"prompt": prompt} for prompt in dict.fromkeys(asked) if prompt not in low]
    (folder / "feedback.jsonl").write_text(lines(kept), "utf-8")
    (folder / "mixed.jsonl").write_text(lines([*kept, *others]), "utf-8")
    (folder / "even.jsonl").write_text(lines([{"prompt": prompt} for prompt in dict.fromkeys(asked)]), "utf-8")
    _write(folder / "measuring.txt", [prompt for part in measuring_prompts() for prompt in part])
    print(f"{requests} requests, {len(low) + len(others)} prompts, {len(low)} of them rank below {LOW:.0f}")


def seeds_of(first: int, prompts: int, seeds: int) -> list[int]:
    """Seeds for ``seeds`` pictures of each prompt, prompt by prompt, none of them twice."""
    return [first + p + s * PRIME for p in range(prompts) for s in range(seeds)]


def draw(runtime: Runtime, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Values:
    """The judge's verdict and the scorers' scores of one picture for each prompt and seed."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for at in range(0, len(prompts), runtime.max_batch):
        texts = list(prompts[at : at + runtime.max_batch])
        images_BCHW = runtime.draw(texts, list(seeds[at : at + runtime.max_batch]), steps)
        for name, score_B in runtime.score(images_BCHW, texts).items():
            found[name] += [float(score) for score in score_B]
        judged = judge_batch(images_BCHW, [parse(text) for text in texts])
        found["right"] += [verdict.right for verdict in judged]
        found["but shape"] += [verdict.right_but_shape for verdict in judged]
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def low_kind(runtime: Runtime, prompts: Sequence[str], steps: int, folder: Path) -> list[bool]:
    """Whether one picture of each prompt ranks so low that the service would keep the prompt."""
    scores = measured(runtime, Group("", prompts, 1), steps, folder, SELECTING_SEED)[TRAINED][:, 0]
    ranked = verdicts(runtime.student, {TRAINED: scores.astype(np.float32)}, steps, (64, 64), len(prompts))
    return [verdict.percentile.get(TRAINED, 100.0) < LOW for verdict in ranked]


def groups(shipped: Runtime, folder: Path) -> list[Group]:
    """Fresh prompts of the low kind and others, prompts of the log, the test prompts, and the short forms."""
    logged = read(folder / "feedback.jsonl")
    fresh = fresh_prompts(FRESH, *FRESH_KEY)
    low = low_kind(shipped, fresh, shipped.student.steps[0], folder)
    kinds = {
        kind: [prompt for prompt, is_low in zip(fresh, low, strict=True) if is_low is kind] for kind in (True, False)
    }
    return [
        Group("fresh, low kind", kinds[True], 4),
        Group("fresh, others", kinds[False][:OTHERS], 4),
        Group("in the log", logged[:: max(1, len(logged) // LOGGED)][:LOGGED], 4),
        Group("test", measuring_prompts()[2], 4),
        Group("`a COLOR SHAPE`", [f"a {color} {shape}" for color in COLORS for shape in SHAPES], 16),
    ]  # fmt: skip


def measured(runtime: Runtime, group: Group, steps: int, folder: Path, first_seed: int = FIRST_SEED) -> Values:
    """A student's pictures of a group; kept, as they are the same every time."""
    about = f"{runtime.student.fingerprint()} {steps} {group.seeds} {first_seed} {hash_of(group.prompts)}"
    file = folder / "pictures" / f"{hash_of([about])}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        each = [prompt for prompt in group.prompts for _ in range(group.seeds)]
        found = draw(runtime, each, seeds_of(first_seed, len(group.prompts), group.seeds), steps)
        np.savez_compressed(file, **{name.replace(" ", "_"): values for name, values in found.items()})  # type: ignore[arg-type]
    with np.load(file) as kept:
        return {name: kept[name.replace(" ", "_")].reshape(-1, group.seeds) for name in MEASURES}


def hash_of(texts: Sequence[str]) -> str:
    """A short hash of a list of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def compared(shipped: Values, retrained: Values) -> list[Row]:
    """Each measure of both, and the difference by prompt."""
    rows = []
    for measure in MEASURES:
        one_P, other_P = shipped[measure].mean(axis=1), retrained[measure].mean(axis=1)
        rows.append(Row(measure, estimate(one_P), estimate(other_P), estimate(other_P - one_P)))
    return rows


def report(found: Sequence[tuple[Group, int, Sequence[Row]]]) -> str:
    """The document's table: for each group and step count shipped, retrained and the paired difference."""
    head = ["prompts", "steps", *(f"{label}: {what}" for label in MEASURES.values() for what in ("before", "gain"))]
    rows = []
    for group, steps, measures in found:
        cells = [
            cell
            for row in measures
            for cell in (f"{row.shipped.mean:.3f}", f"{row.gain.mean:+.3f} ± {row.gain.error:.3f}")
        ]
        rows.append([f"{group.name} ({len(group.prompts)} x {group.seeds})", str(steps), *cells])
    return table(head, rows)


def compare(served: Path, retrained: Path, folder: Path, steps: Sequence[int]) -> str:
    """Draw what is missing with both students, and make the table."""
    before, after = load(served, "auto", 1), load(retrained, "auto", 1)
    found: list[tuple[Group, int, list[Row]]] = []
    for group in groups(before, folder):
        for count in steps:
            values = [measured(runtime, group, count, folder) for runtime in (before, after)]
            found.append((group, count, compared(*values)))
            print(report(found[-1:]).splitlines()[-1], flush=True)
    return report(found)


def picture(served: Path, retrained: Path, path: Path) -> None:
    """What both students draw with their most steps for every colour of the shapes in UNSEEN, with the same seeds."""
    import torch

    from training.figures import grid

    runtimes = {"served": load(served, "auto", 1), "retrained": load(retrained, "auto", 1)}
    rows = {}
    for shape in UNSEEN:
        for name, runtime in runtimes.items():
            images = [runtime.draw([f"a {color} {shape}"], [i], STEPS[0])[0] for i, color in enumerate(COLORS)]
            rows[f"{name}: a {', '.join(COLORS)} {shape}"] = torch.from_numpy(np.stack(images))
    grid(rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("narrow", "traffic", "compare", "picture"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--served", type=Path, default=BUNDLE, help="the served student's bundle")
    parser.add_argument("--retrained", type=Path, default=FOLDER / "retrained", help="the retrained student's bundle")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument(
        "--write", metavar="NAME", help='write docs/reward-serving.md\'s table between the marks "NAME"'
    )
    arguments = parser.parse_args()
    if arguments.what == "narrow":
        return narrow(arguments.folder)
    if arguments.what == "traffic":
        return traffic(TRAFFIC, arguments.folder, arguments.served)
    if arguments.what == "picture":
        return picture(arguments.served, arguments.retrained, DOCUMENT.with_name("feedback_loop.png"))
    text = compare(arguments.served, arguments.retrained, arguments.folder, arguments.steps)
    if arguments.write:
        write_between(DOCUMENT, text, f"<!-- {arguments.write}: begin -->", f"<!-- {arguments.write}: end -->")


if __name__ == "__main__":
    main()
