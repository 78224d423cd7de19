"""``python -m training.shapes.acceptance``: evaluates the starter models and scorers and writes docs/starter.md.

Every table has a row for the ground truth and one for the truth through the autoencoder, an upper bound for a student.
Errors are standard errors over prompts: all prompts differ, and several pictures of one prompt count as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from rewards import shapes as rewards
from student.bundle import read_student
from student.families.find import open_family
from training.endings import one_sentence
from training.progress import console, quiet, steps
from training.sampler import Sampler
from training.shapes import degrade, pairs, prompts, vocabulary, world
from training.shapes.autoencoder import round_trip
from training.shapes.grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, parse
from training.shapes.judging import judge_prompts

BATCH = 64
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One generator's pictures for the test prompts: the judge's verdicts, and each scorer's scores."""

    name: str
    right: FloatArray
    right_but_shape: FloatArray
    scores: Mapping[str, FloatArray]


def scenes_of(texts: Sequence[str], *key: int) -> world.Scenes:
    """A scene for each caption; what a caption leaves out is sampled."""
    gen = world.rng(*key)
    num = len(texts)
    captions = [parse(text) for text in texts]
    columns = {name: np.zeros((num, 2), dtype=np.int64) for name in ("size_NK", "color_NK", "shape_NK")}
    drawn_size = gen.integers(0, len(SIZES), num)
    for i, caption in enumerate(captions):
        for k, thing in enumerate(caption.things):
            columns["size_NK"][i, k] = drawn_size[i] if thing.size is None else SIZES.index(thing.size)
            columns["color_NK"][i, k] = COLORS.index(thing.color)
            columns["shape_NK"][i, k] = SHAPES.index(thing.shape)
    backgrounds = gen.integers(0, len(BACKGROUNDS), num)
    asked = [caption.background for caption in captions]
    named = [b if name is None else BACKGROUNDS.index(name) for b, name in zip(backgrounds, asked, strict=True)]
    scenes = world.Scenes(
        count_N=np.array([len(caption.things) for caption in captions]),
        relation_N=np.array([RELATIONS.index(c.relation) if c.relation else 0 for c in captions]),
        background_N=np.array(named),
        x_NK=np.zeros((num, 2)),
        y_NK=np.zeros((num, 2)),
        radius_NK=np.zeros((num, 2)),
        **columns,
    )
    return world.place(scenes, gen)


def styles_of(texts: Sequence[str]) -> pairs.Styles:
    """The parts that each caption names."""
    captions = [parse(text) for text in texts]
    named = pairs.full_styles(len(texts))
    return pairs.Styles(
        np.array([caption.things[0].size is not None for caption in captions]),
        np.array([caption.background is not None for caption in captions]),
        named.article_N,
        named.filler_N,
    )


@torch.no_grad()
def measured(name: str, images: Tensor, texts: Sequence[str], scorers: Mapping[str, rewards.Scorer]) -> Row:
    """Judge and score pictures of ``texts``."""
    verdicts = judge_prompts(images, texts)
    ids = torch.tensor(vocabulary.encode(vocabulary.tokenizer(), list(texts)))
    parts = list(zip(images.split(BATCH), ids.split(BATCH), strict=True))
    scores = {key: torch.cat([model(x, i) for x, i in parts]).double().numpy() for key, model in scorers.items()}
    return Row(name, np.array(verdicts["right"]), np.array(verdicts["right_but_shape"]), scores)


def mean_error(values: FloatArray) -> str:
    """Mean ± standard error."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def within_prompt(rows: Sequence[Row], scorer: str) -> float:
    """The correlation of a scorer with the judge over the pictures of each prompt, both less their prompt's mean."""
    score_RN = np.stack([row.scores[scorer] for row in rows])
    right_RN = np.stack([row.right for row in rows])
    score_RN, right_RN = score_RN - score_RN.mean(0), right_RN - right_RN.mean(0)
    return float((score_RN * right_RN).sum() / math.sqrt((score_RN**2).sum() * (right_RN**2).sum()))


def ways(texts: Sequence[str], scenes: world.Scenes, vae: Any) -> dict[str, Tensor]:
    """The ground truth, and pictures that are wrong in known ways, through the autoencoder."""
    gen = world.rng(11, 5)
    altered, _ = pairs.alter(scenes, styles_of(texts), gen)
    truth = world.render_NCHW(scenes)
    return {
        "rendered truth": truth,
        "truth through the autoencoder": _through(vae, truth),
        "one attribute wrong": _through(vae, world.render_NCHW(world.place(altered, gen))),
        "badly drawn": _through(vae, degrade.draw(scenes, 71)[0]),
    }


def _through(vae: Any, images: Tensor) -> Tensor:
    return torch.cat([round_trip(vae, part) for part in images.split(BATCH)])


def drawers(models: Path) -> dict[str, Sampler]:
    """The teacher as on its card, and the student at each of its step counts."""
    options = {"local_files_only": True, "max_tokens": vocabulary.MAX_TOKENS}
    teacher = open_family(models / "shapes-teacher", **options)  # type: ignore[arg-type]
    shape = teacher.latent_shape(world.SIDE_PX, world.SIDE_PX)
    found = {"teacher, 50 steps, guidance 2.5": Sampler(teacher, teacher.sigmas(50, shape), 2.5)}
    found["teacher, 8 steps, guidance 2.5"] = Sampler(teacher, teacher.sigmas(8, shape), 2.5)
    bundle = read_student(models / "shapes")
    student = open_family(models / "shapes", **options)  # type: ignore[arg-type]
    for nfe in sorted(bundle.steps):
        found[f"student, {nfe} step{'s' * (nfe > 1)}"] = Sampler(student, bundle.sigmas[nfe])
    return found


def _draw(sampler: Sampler, texts: Sequence[str], label: str) -> Tensor:
    shape = sampler.model.latent_shape(world.SIDE_PX, world.SIDE_PX)
    parts = []
    for at in steps(label, 0, -(-len(texts) // BATCH), passing=True):
        some = texts[at * BATCH : (at + 1) * BATCH]
        parts.append(sampler.draw(some, range(at * BATCH, at * BATCH + len(some)), shape, BATCH))
    return torch.cat(parts)


def quality(rows: Sequence[Row], texts: Sequence[str], shorts: Mapping[str, Row]) -> str:
    """The shares that are right, and right in all but the shape, by stratum."""
    one = np.array([parse(text).relation is None for text in texts])
    lines = [
        "| | all: right | but shape | single: right | but shape | pairs: right | but shape | `a COLOR SHAPE`: right |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        cells = [
            mean_error(values[at]) for at in (one | True, one, ~one) for values in (row.right, row.right_but_shape)
        ]
        short = mean_error(shorts[row.name].right) if row.name in shorts else ""
        lines.append(f"| {row.name} | {' | '.join(cells)} | {short} |")
    return "\n".join(lines) + "\n"


def headroom(rows: Sequence[Row], scorers: Sequence[str]) -> str:
    """Each scorer's mean for each row, how far the truth is above the teacher, and its agreement with the judge."""
    by_name = {row.name: row for row in rows}
    teacher = next(row for row in rows if row.name.startswith("teacher, 50"))
    compared = [row for row in rows if row.name != "rendered truth"]
    lines = ["| | " + " | ".join(scorers) + " |", "|---" * (1 + len(scorers)) + "|"]
    for row in rows:
        lines.append(f"| {row.name} | " + " | ".join(mean_error(row.scores[s]) for s in scorers) + " |")
    gaps = []
    for name in scorers:
        gap = by_name["truth through the autoencoder"].scores[name] - teacher.scores[name]
        error = gap.std(ddof=1) / math.sqrt(len(gap))
        gaps.append(f"{gap.mean():+.3f} ± {error:.3f} ({gap.mean() / error:.1f} errors)")
    lines.append("| **truth (autoencoder) minus teacher** | " + " | ".join(gaps) + " |")
    agreement = [f"{within_prompt(compared, name):.2f}" for name in scorers]
    lines.append("| **correlation with the judge within prompt** | " + " | ".join(agreement) + " |")
    return "\n".join(lines) + "\n"


TEXT = """# The starter world's models

<!-- until stopped -->
```bash
make serve
```

```bash
.venv-serve/bin/python -m fewstep generate "a red heart above a blue star" --seed 7 -o heart.png
```

<!-- not run: takes long -->
```bash
make install
.venv/bin/python -m training.shapes.acceptance --out out/starter.md    # evaluates them again
```

What `models/shapes-teacher`, `models/shapes` and `models/shapes-scorers` can do, according to the exact judge (a
program, `training/shapes/judge.py`; nothing trains on it). {num} test prompts, all different, none of them a caption
that the teacher was fine-tuned on or the student saw; prompt i with seed i, ± one standard error over prompts. Written
by `python -m training.shapes.acceptance`.

{quality}
`a COLOR SHAPE` are all 64 captions that name a colour and a shape and nothing else, with two seeds each; {held} of them
are held out. The truth is what the world renders for a prompt; through the autoencoder it is the best that a student
can reach.

## What the scorers can distinguish

The probability that a picture is right for its prompt, according to each scorer. A scorer is accepted if it rates the
truth more than five standard errors above the teacher, and if its correlation with the judge within a prompt (over the
rows below the first) is above 0.7.

{headroom}
"""


def main(
    models: Annotated[Path, typer.Option(help="Folder of the starter models.")] = Path("models"),
    out: Annotated[Path, typer.Option(help="The document to write.")] = Path("docs/starter.md"),
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0 leaves the choice to torch.")] = 0,
) -> None:
    """Evaluate the starter models and write the document."""
    quiet()
    if threads:
        torch.set_num_threads(threads)
    with one_sentence():
        texts = prompts.measuring_prompts()[2]
        scorers = {path.name: rewards.load(path) for path in sorted((models / "shapes-scorers").iterdir())}
        vae = AutoencoderTiny.from_pretrained(models / "shapes" / "vae")
        pictures = ways(texts, scenes_of(texts, 11), vae)
        rows = [measured(name, images, texts, scorers) for name, images in pictures.items()]
        forms = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
        shorts = {}
        for name, sampler in drawers(models).items():
            rows.append(measured(name, _draw(sampler, texts, name), texts, scorers))
            if not name.startswith("teacher, 50"):
                two = measured(name, _draw(sampler, forms * 2, name), forms * 2, {})
                right, but_shape = (values.reshape(2, -1).mean(0) for values in (two.right, two.right_but_shape))
                shorts[name] = Row(name, right, but_shape, {})
        held = int(prompts.held_out(scenes_of(forms, 1), styles_of(forms)).sum())
        text = TEXT.format(
            num=len(texts),
            held=held,
            quality=quality(rows, texts, shorts),
            headroom=headroom(rows, list(scorers)),
        )
        out.write_text(text)
        console.print(text)


if __name__ == "__main__":
    typer.run(main)
