"""The stages of the starter world's pretraining, and the models that they leave behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from rewards import shapes as rewards
from student.pipeline import save_pipeline
from training.evaluate import mean_error
from training.shapes import autoencoder, scorer, teacher, teacher_card
from training.shapes.preset import ShapesPretraining


def run(config: ShapesPretraining, run_dir: Path, models: Path, stages: Sequence[str]) -> dict[str, float]:
    """Run the chosen stages in order; finished models are written to ``models``. Returns their figures."""
    figures: dict[str, float] = {}
    if "autoencoder" in stages:
        figures["autoencoder psnr_db"] = autoencoder.psnr_db(autoencoder.train(config.autoencoder, run_dir))
    for training in (config.trained, config.heldout):
        if training.name in stages:
            model = scorer.train(training, run_dir)
            table = scorer.accuracy(model)
            write_scorer(model, training, table, models / "shapes-scorers" / training.name)
            figures |= {f"{training.name} {name}": value for name, value in table.items()}
    if "teacher" in stages:
        parts = teacher.train(config.teacher, run_dir)
        vae = AutoencoderTiny.from_pretrained(run_dir / "autoencoder")
        write_teacher(parts, vae, models / "shapes-teacher")
        if (models / "shapes-scorers" / "heldout").is_dir():
            rows = teacher_card.measure(
                models / "shapes-teacher", models / "shapes-scorers", config.guidance, config.evaluate_prompts, 64
            )
            teacher_card.write(models / "shapes-teacher", rows, config.guidance, json.dumps(asdict(config.teacher)))
            figures |= {f"teacher {row.nfe} steps right": mean_error(row.judge["right"])[0] for row in rows[:4]}
        figures["teacher parameters"] = float(teacher.num_parameters(parts.transformer))
    return figures


def write_scorer(model: rewards.Scorer, training: scorer.ScorerTraining, table: dict[str, float], path: Path) -> None:
    """The scorer's weights, with its pairwise accuracies and how it was trained in its card."""
    rewards.save(model, path)
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(table.items()))
    settings = json.dumps(asdict(training))
    (path / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n# Starter scorer: {training.name}\n\n"
        f"A learned preference scorer of (image, prompt) for the starter world ({training.kind}), trained on pairs\n"
        "that the world makes without labels. Pairwise accuracy on 1,024 fresh scenes, by kind of pair:\n\n"
        f"| kind | accuracy |\n|---|---|\n{rows}\n\nTraining: `{settings}`\n"
    )


def write_teacher(parts: teacher.Parts, vae: AutoencoderTiny, path: Path) -> None:
    """The teacher as a FluxPipeline on disk (fp16 weights)."""
    parts.modules().eval()
    with torch.no_grad():
        save_pipeline(teacher.pipeline(parts, vae), path)


def shortened(config: ShapesPretraining, steps: int) -> ShapesPretraining:
    """The same pretraining with ``steps`` steps a stage: for tests, which look at plumbing and not at quality."""
    return replace(
        config,
        autoencoder=replace(config.autoencoder, steps=steps),
        trained=replace(config.trained, steps=steps, batch=4),
        heldout=replace(config.heldout, steps=steps, batch=4),
        teacher=replace(config.teacher, steps=steps, batch=4),
    )
