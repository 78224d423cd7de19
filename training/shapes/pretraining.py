"""The stages of the starter world's pretraining, and the models that they produce."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from rewards import shapes as rewards
from student.pipeline import open_pipeline, save_pipeline
from training.evaluate import mean_error
from training.shapes import autoencoder, failures, reader, refine, scorer, sharpen, teacher, teacher_card
from training.shapes.preset import ShapesPretraining

PAIRS = "pairs that the world generates without labels"
LEARNED = {"query": PAIRS, "clip": PAIRS, "reader": "scenes whose words the world knows, and on generators' pictures"}


def run(config: ShapesPretraining, run_dir: Path, models: Path, stages: Sequence[str]) -> dict[str, float]:
    """Run the chosen stages in order; finished models are written to ``models``. Returns their figures."""
    figures: dict[str, float] = {}
    place = models / "shapes-teacher"
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
        write_teacher(parts, AutoencoderTiny.from_pretrained(run_dir / "autoencoder"), place)
        figures["teacher parameters"] = float(teacher.num_parameters(parts.transformer))
    if "decoder" in stages:
        vae = sharpen.train(config.decoder, place / "vae", run_dir)
        figures["decoder psnr_db"] = autoencoder.psnr_db(vae)
        _write_decoder(vae, place)
    if "failures" in stages:
        failures.draw(config.failures, run_dir / "failures.pt")
    if "scorers" in stages:
        vae, drawn = AutoencoderTiny.from_pretrained(place / "vae"), failures.read([run_dir / "failures.pt"])
        for training in (config.trained, config.heldout):
            path = models / "shapes-scorers" / training.name
            model = refine.train(config.refine, training, path, vae, drawn, run_dir)
            write_scorer(model, training, scorer.accuracy(model), path)
    if "reader" in stages:
        failures.draw(config.students, run_dir / "failures-students.pt")
        vae = AutoencoderTiny.from_pretrained(place / "vae")
        model = reader.train(config.reader, vae, failures.read([run_dir / "failures-students.pt"]), run_dir)
        path = models / "shapes-scorers" / config.reader.name
        write_scorer(model, config.reader, scorer.accuracy(model), path)
    if "teacher" in stages or "scorers" in stages:
        figures |= _measure_teacher(config, models)
    return figures


def _measure_teacher(config: ShapesPretraining, models: Path) -> dict[str, float]:
    """Write the teacher's card, if there is a scorer to evaluate it with."""
    place, scorers = models / "shapes-teacher", models / "shapes-scorers"
    if not ((scorers / "heldout").is_dir() and place.is_dir()):
        return {}
    rows = teacher_card.measure(place, scorers, config.guidance, config.evaluate_prompts, 64)
    teacher_card.write(place, rows, config.guidance, json.dumps(asdict(config.teacher)))
    return {f"teacher {row.nfe} steps right": mean_error(row.judge["right"])[0] for row in rows[:4]}


def _write_decoder(vae: AutoencoderTiny, place: Path) -> None:
    """Give the teacher at ``place`` another decoder."""
    pipe = open_pipeline(place, vae=vae)
    save_pipeline(pipe, place)


def write_scorer(
    model: rewards.Scorer, training: scorer.ScorerTraining | reader.ReaderConfig, table: dict[str, float], path: Path
) -> None:
    """The scorer's weights, with its pairwise accuracies and how it was trained in its card."""
    rewards.save(model, path)
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(table.items()))
    settings = json.dumps(asdict(training))
    (path / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n# Starter scorer: {training.name}\n\n"
        f"A learned scorer of (image, prompt) for the starter world ({model.config.kind}), trained on\n"
        f"{LEARNED[model.config.kind]}. Pairwise accuracy on 1,024 fresh scenes, by kind of pair:\n\n"
        f"| kind | accuracy |\n|---|---|\n{rows}\n\nTraining: `{settings}`\n"
    )


def write_teacher(parts: teacher.Parts, vae: AutoencoderTiny, path: Path) -> None:
    """The teacher as a FluxPipeline on disk (fp16 weights)."""
    parts.modules().eval()
    with torch.no_grad():
        save_pipeline(teacher.pipeline(parts, vae), path)


def shortened(config: ShapesPretraining, steps: int) -> ShapesPretraining:
    """The same pretraining with ``steps`` steps per stage: for tests of the wiring, not of quality."""
    return replace(
        config,
        autoencoder=replace(config.autoencoder, steps=steps),
        trained=replace(config.trained, steps=steps, batch=4),
        heldout=replace(config.heldout, steps=steps, batch=4),
        teacher=replace(config.teacher, steps=steps, batch=4),
        decoder=replace(config.decoder, steps=steps, batch=4),
        failures=replace(config.failures, pictures=64),
        refine=replace(config.refine, steps=steps, scenes=2, pictures=4),
        students=replace(config.students, pictures=64),
        reader=replace(config.reader, steps=steps, scenes=2, pictures=4),
    )
