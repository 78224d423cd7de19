"""The teacher's model card: its figures at several step counts on the test prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from student.families.find import open_family
from training import evaluate
from training.evaluate import Evaluation, Plan, cached, fingerprint, hash_model, mean_error
from training.sampler import Sampler
from training.scorers import measure_with, open_rewards, sources
from training.shapes import prompts, vocabulary
from training.shapes.judging import judge_prompts
from training.shapes.world import SIDE_PX

STEP_COUNTS, DRAW_BATCH = (50, 16, 8, 4), 64
JUDGED = ("right", "right_but_shape", "objects", "color", "shape", "size", "relation")


def measure(path: Path, scorers: Path, guidance: float, num: int, varied: int) -> list[Evaluation]:
    """Figures of the teacher at each of STEP_COUNTS, and at 50 steps without guidance."""
    model = open_family(path, local_files_only=True, max_tokens=vocabulary.MAX_TOKENS)
    rewards = open_rewards(str(scorers / "trained"), str(scorers / "heldout"), model, learns_from_it=False)
    tools, shape = measure_with(rewards, model, judge_prompts), model.latent_shape(SIDE_PX, SIDE_PX)
    texts, scored_by = prompts.measuring_prompts()[2][:num], sources(rewards)
    wanted = [(nfe, guidance) for nfe in STEP_COUNTS]
    if guidance != 1.0:
        wanted.append((STEP_COUNTS[0], 1.0))
    rows, weights = [], hash_model(model)
    for nfe, strength in wanted:
        sampler = Sampler(model, model.sigmas(nfe, shape), strength)
        plan = Plan(texts, texts[:varied], shape, DRAW_BATCH)
        key = fingerprint(weights, sampler, plan, f"teacher{scored_by}")
        rows.append(cached(evaluate.CACHE, key, partial(tools.evaluate, "teacher", sampler, plan)))
    return rows


def write(path: Path, rows: Sequence[Evaluation], guidance: float, settings: str) -> None:
    """Write ``README.md`` beside the teacher; ``settings`` is its training configuration as JSON."""
    head = "| NFE | guidance | " + " | ".join(name.replace("_", " ") for name in JUDGED) + " | diversity |"
    lines = [head, "|---" * (len(JUDGED) + 3) + "|"]
    for row in rows:
        cells = ["{:.3f} ± {:.3f}".format(*mean_error(row.judge[name])) for name in JUDGED]
        cells.append("{:.2f} ± {:.2f}".format(*mean_error(row.diversity)))
        lines.append(f"| {row.nfe} | {row.guidance:g} | " + " | ".join(cells) + " |")
    best = mean_error(rows[0].judge["right"])[0], mean_error(rows[0].judge["right_but_shape"])[0]
    verdict = "It is met" if best[0] >= 0.8 and best[1] >= 0.9 else "It is not met yet"
    (path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n# shapes-teacher\n\n"
        "The starter world's teacher: a small FluxPipeline trained from scratch by `python -m training.pretrain`.\n"
        f"Measured on {len(rows[0].judge['right'])} held-out test prompts by the exact judge (a program), prompt i\n"
        "with seed i, mean ± standard error; guidance is FluxPipeline's `true_cfg_scale`, negative prompt empty.\n\n"
        + "\n".join(lines)
        + f"\n\nThe target was 0.80 fully right and 0.90 right in all but the shape at 50 steps. {verdict} "
        f"(guidance {guidance:g}: {best[0]:.3f} and {best[1]:.3f}).\n\nTraining: `{settings}`\n\n" + _usage(guidance)
    )


def _usage(guidance: float) -> str:
    return f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("models/shapes-teacher")
pipe(
    "a red heart above a blue star",
    negative_prompt="",
    true_cfg_scale={guidance:g},
    num_inference_steps=50,
    height=64,
    width=64,
    max_sequence_length={vocabulary.MAX_TOKENS},
)
```
"""
