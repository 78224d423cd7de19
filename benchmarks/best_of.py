"""What best_of, a floor and a cascade buy on the starter student: predicted and measured, by its scorers and the judge.

python -m benchmarks.best_of            draws what is missing (about ten minutes on one core), prints the tables,
                                        and writes out/best_of.png
python -m benchmarks.best_of --write    tables and plot also into docs/reward-serving.md and docs/best_of.png

Drawn are the starter world's test prompts, which no training and no calibration has seen, SEEDS pictures of each at
each step count; they are kept in out/best_of.npz. Everything else is computed of these pictures: the mean over all
choices of N, and the rounds of a cascade as service/queue/rounds.py plans them. Errors are standard ones over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.engine import REPOSITORY
from benchmarks.serving.report import write_between
from service.http.quality import STRIDE
from service.queue.job import Job
from service.queue.rounds import stages
from student.bundle import Student, WithinPrompt, read_student
from student.reference import reference_at, score_at
from student.runtimes.load import load
from student.within_prompt import chosen, normal_best_of, predicted_gain
from training.shapes.grammar import parse
from training.shapes.judge import judge_batch
from training.shapes.prompts import measuring_prompts

BUNDLE = REPOSITORY / "models" / "shapes"
KEPT, PICTURE = REPOSITORY / "out" / "best_of.npz", REPOSITORY / "out" / "best_of.png"
DOCUMENT, SHOWN = REPOSITORY / "docs" / "reward-serving.md", REPOSITORY / "docs" / "best_of.png"
SEEDS, FIRST_SEED, AT_ONCE = 16, 10_000, 8
COUNTS, STEPS, CASCADE, FLOORS = (1, 2, 4, 8, 16), (1, 2, 4, 8), (2, 4, 8), ("p5", "p10", "p20", "p35", "p50")
CHOOSES, REPORTS, JUDGE = "trained", "heldout", "judge"
MEASURES = (CHOOSES, REPORTS, JUDGE)

Array = NDArray[np.float64]
Pictures = dict[int, dict[str, Array]]  # by step count and measure: values_PS of P prompts and S seeds


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Way:
    """One way to serve: its mean network calls for an image, and what that gives by each measure, by prompt."""

    name: str
    steps: float
    values: dict[str, Array]


def estimate(values_P: Array) -> Estimate:
    return Estimate(float(values_P.mean()), float(values_P.std(ddof=1)) / len(values_P) ** 0.5)


def draw(prompts: Sequence[str]) -> Pictures:
    """Every picture's scores, and 1 where the judge finds everything right."""
    runtime = load(BUNDLE, "auto", 1)
    found: Pictures = {steps: {name: np.zeros((len(prompts), SEEDS)) for name in MEASURES} for steps in STEPS}
    for steps in STEPS:
        for p, prompt in enumerate(prompts):
            seeds = [(FIRST_SEED + p + c * STRIDE) % 2**32 for c in range(SEEDS)]
            for at in range(0, SEEDS, AT_ONCE):
                part, texts = slice(at, at + AT_ONCE), [prompt] * AT_ONCE
                images_BCHW = runtime.draw(texts, seeds[part], steps)
                for name, score_B in runtime.score(images_BCHW, texts).items():
                    found[steps][name][p, part] = score_B
                verdicts = judge_batch(images_BCHW, [parse(text) for text in texts])
                found[steps][JUDGE][p, part] = [verdict.right for verdict in verdicts]
        print(f"{steps} steps: {len(prompts)} prompts, {SEEDS} seeds each", flush=True)
    return found


def pictures(prompts: Sequence[str], student: Student) -> Pictures:
    """Those that were drawn before with this very student, or new ones."""
    about = f"{student.fingerprint()} {FIRST_SEED} {SEEDS} {len(prompts)}"
    if KEPT.is_file():
        with np.load(KEPT) as kept:
            if str(kept["about"]) == about:
                return {steps: {name: kept[f"{steps} {name}"] for name in MEASURES} for steps in STEPS}
    found = draw(prompts)
    KEPT.parent.mkdir(exist_ok=True)
    flat = {f"{steps} {name}": values_PS for steps, by in found.items() for name, values_PS in by.items()}
    np.savez_compressed(KEPT, about=np.array(about), **flat)  # type: ignore[arg-type]
    return found


def best_of_rows(found: Pictures, known: WithinPrompt | None, steps: int) -> list[list[str]]:
    """Gains over one picture of the same prompt, predicted and measured, and the judge's rate."""
    by, rows = found[steps], []
    for count in COUNTS:
        row = [str(count)]
        for name in (CHOOSES, REPORTS):
            gain_P = chosen(by[CHOOSES], by[name], count) - by[name].mean(axis=1)
            predicted = predicted_gain(known, CHOOSES, name, count) if known else None
            row += [f"{normal_gain(known, name, count):.2f}" if known else "–"]
            row += ["–" if predicted is None else f"{predicted:.3f}", str(estimate(gain_P))]
        rows.append([*row, str(estimate(chosen(by[CHOOSES], by[JUDGE], count)))])
    return rows


def normal_gain(known: WithinPrompt, name: str, count: int) -> float:
    """What normal scores would gain."""
    own = normal_best_of(count) * known.spread[name]
    return own if name == CHOOSES else own * known.correlation[" ".join(sorted((CHOOSES, name)))]


def served(found: Pictures, student: Student, floor: str, best_of: int, cascade: Sequence[int]) -> Way:
    """A floor, as the service serves it: each image is drawn round by round until it has reached it."""
    job = Job("", "", student.id, student.version, 64, 64, cascade[0], "", (0,), "png", candidates=best_of,
              rank_by=CHOOSES, min_reward=floor, cascade=tuple(cascade))  # fmt: skip
    reference = reference_at(student, CHOOSES, cascade[0], (64, 64))
    assert reference is not None
    limit = score_at(reference, float(floor[1:]))
    shape = found[cascade[0]][CHOOSES].shape
    best, steps_PS = {name: np.full(shape, -np.inf) for name in MEASURES}, np.zeros(shape)
    for stage in stages(job):
        below_PS = best[CHOOSES] < limit
        for candidate in range(
            stage.first, stage.end
        ):  # every picture is the first of one image, the second of another
            drawn = {name: np.roll(found[stage.steps][name], -candidate, axis=1) for name in MEASURES}
            better_PS = below_PS & (drawn[CHOOSES] > best[CHOOSES])
            steps_PS += below_PS * stage.steps
            best = {name: np.where(better_PS, drawn[name], best[name]) for name in MEASURES}
    label = f"{floor}, cascade {list(cascade)}" if len(cascade) > 1 else f"{floor}, best_of {best_of}"
    return Way(label, float(steps_PS.mean()), {name: values_PS.mean(axis=1) for name, values_PS in best.items()})


def fixed(found: Pictures, steps: int) -> Way:
    return Way(f"always {steps}", steps, {name: found[steps][name].mean(axis=1) for name in MEASURES})


def mixed(found: Pictures, steps: float) -> Way:
    """As many calls in the mean: some images with the next lower fixed count, the others with the next higher one."""
    low, high = max(one for one in CASCADE if one <= steps), min(one for one in CASCADE if one >= steps)
    share = 0.0 if low == high else (steps - low) / (high - low)
    below, above = fixed(found, low), fixed(found, high)
    values = {name: (1 - share) * below.values[name] + share * above.values[name] for name in MEASURES}
    return Way(f"always {low} or {high}", steps, values)


def ways_of(found: Pictures, student: Student) -> list[Way]:
    cascades = [served(found, student, floor, 1, cascade) for cascade in (CASCADE, CASCADE[:2]) for floor in FLOORS]
    redraws = [served(found, student, floor, 4, CASCADE[:1]) for floor in ("p20", "p50")]
    return [*(fixed(found, steps) for steps in CASCADE), *cascades, *redraws]


def way_rows(found: Pictures, ways: Sequence[Way]) -> list[list[str]]:
    """Each way, and for those that are no fixed count the difference to one of equal cost, paired by prompt."""
    rows = []
    for way in ways:
        row = [way.name, f"{way.steps:.2f}", *(str(estimate(way.values[name])) for name in MEASURES)]
        if way.steps not in CASCADE:
            even = mixed(found, way.steps)
            row += [f"{one.mean:+.3f} ± {one.error:.3f}" for one in (
                estimate(way.values[name] - even.values[name]) for name in MEASURES)]  # fmt: skip
        else:
            row += ["", "", ""]
        rows.append(row)
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(found: Pictures, student: Student) -> str:
    """The document's tables."""
    known, parts = student.within_prompt or {}, []
    head = [
        "N",
        "chooser: normal",
        "predicted",
        "measured",
        "reporter: normal",
        "predicted",
        "measured",
        "judge: all right",
    ]
    for steps in (4, 1):
        at = known.get(str(steps))
        parts += [f"At {steps} step{'s' * (steps > 1)}:", table(head, best_of_rows(found, at, steps))]
    again = [["", "same seed, 4 steps", "new seed, 2 steps", "new seed, 4 steps"], *fails_again(found, student)]
    parts += ["Of pictures at 2 steps below the floor, the share that is below it again:", table(again[0], again[1:])]
    head = ["way", "steps", *MEASURES, *(f"{name} at equal cost" for name in MEASURES)]
    parts += ["Cost against quality:", table(head, way_rows(found, ways_of(found, student)))]
    return "\n\n".join(parts)


def fails_again(found: Pictures, student: Student) -> list[list[str]]:
    reference, rows = reference_at(student, CHOOSES, 2, (64, 64)), []
    assert reference is not None
    for floor in ("p10", "p20", "p50"):
        limit = score_at(reference, float(floor[1:]))
        first_PS = found[2][CHOOSES] < limit
        tries = (found[4][CHOOSES], np.roll(found[2][CHOOSES], 1, axis=1), np.roll(found[4][CHOOSES], 1, axis=1))
        rows.append([floor, *(f"{(again_PS < limit)[first_PS].mean():.2f}" for again_PS in tries)])
    return rows


def plot(found: Pictures, student: Student, file: Path) -> None:
    """Gains of N, and cost against quality by each measure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    gains, *axes = figure.subplots(1, 4)
    known = (student.within_prompt or {}).get("4")
    for name, color in ((CHOOSES, "C0"), (REPORTS, "C1")):
        by = found[4]
        each = [estimate(chosen(by[CHOOSES], by[name], n) - by[name].mean(axis=1)) for n in COUNTS]
        bars = [one.error for one in each]
        gains.errorbar(
            COUNTS, [one.mean for one in each], bars, color=color, marker="o", capsize=3, label=f"{name}, measured"
        )
        if known:
            predicted = [predicted_gain(known, CHOOSES, name, n) or 0.0 for n in COUNTS]
            gains.plot(COUNTS, predicted, color=color, linestyle="--", label=f"{name}, predicted")
    gains.set(
        xscale="log", xticks=COUNTS, xticklabels=COUNTS, xlabel="best_of", ylabel="gain", title="best of N, 4 steps"
    )
    gains.legend(fontsize=8)
    groups: list[tuple[str, Callable[[Way], bool]]] = [
        ("always", lambda way: way.name.startswith("always")),
        ("cascade [2, 4, 8]", lambda way: "[2, 4, 8]" in way.name),
        ("cascade [2, 4]", lambda way: "[2, 4]" in way.name),
        ("best_of 4 at 2 steps", lambda way: "best_of" in way.name),
    ]
    ways = ways_of(found, student)
    for axis, name in zip(axes, MEASURES, strict=True):
        for label, belongs in groups:
            own = [way for way in ways if belongs(way)]
            each = [estimate(way.values[name]) for way in own]
            axis.errorbar([way.steps for way in own], [one.mean for one in each], [one.error for one in each],
                          marker="o", capsize=3, label=label)  # fmt: skip
        axis.set(xlabel="mean network calls of an image", title=name)
    axes[0].legend(fontsize=8)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tables and plot into docs/")
    arguments = parser.parse_args()
    student = read_student(BUNDLE)
    found = pictures(measuring_prompts()[2], student)
    text = report(found, student)
    print(text)
    plot(found, student, SHOWN if arguments.write else PICTURE)
    if arguments.write:
        write_between(DOCUMENT, text, "<!-- best_of: begin -->", "<!-- best_of: end -->")


if __name__ == "__main__":
    main()
