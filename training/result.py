"""The bundle that a RATS run writes: pipeline, student.json, model card, sample grid and curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from rewards.weighted import Calibration
from student import within_prompt
from student.base import BASE, Base
from student.bundle import RewardReference, Scorer, Student, WithinPrompt
from student.families.family import Family
from student.families.two_experts import networks
from student.files import sha256, write_student
from student.pipeline import open_pipeline, read_index, save_pipeline, shift_no_more
from student.prompts import TOKENIZERS
from student.reference import distribution, with_distribution
from student.saved import components
from student.schedule import by_size
from training import figures
from training.card import card
from training.evaluate import DIVERSITY, Evaluation, mean_error
from training.experiment.setup import Setup
from training.origin import origin
from training.scorers import HELDOUT, TRAINED
from training.steplog import read_log

ROLES = (TRAINED, HELDOUT)  # what a service may score with
CALIBRATION = "calibration.txt"  # prompts of the model's own world, with which its exports are proven
PROOF_PROMPTS = 32
FP16_MAX = torch.finfo(torch.float16).max


def save(out: Path, teacher: str, model: Family, weights: str) -> None:
    """Write the student's pipeline to ``out``: the teacher's, with another transformer (or two experts) and scheduler.

    The encoders may have been dropped during training, so the parts that were not trained are read again from the
    teacher. A run with bf16 weights is saved in the types that it was evaluated in; one with fp32 weights in fp16, if
    every weight is in fp16's range.
    """
    trained = networks(model.transformer)
    if weights == "bf16":
        types = {"default": torch.bfloat16, **dict.fromkeys(model.in_float32, torch.float32)}
        pipe = open_pipeline(teacher, types, local_files_only=False, **trained)
        stored = None
    else:
        pipe = open_pipeline(teacher, local_files_only=False, **trained)
        stored = torch.float16 if _fit_fp16(pipe) else None
    shift_no_more(pipe)
    save_pipeline(pipe, out, stored)


def save_beside_adapter(out: Path, teacher: str, family: str) -> None:
    """Write what a student has beside its adapter: where its base lies and what is read there, tokenizers, schedule."""
    index = dict(read_index(teacher, local_files_only=False))
    is_folder = Path(teacher).is_dir()
    folder = Path(teacher).resolve() if is_folder else Path(snapshot_download(teacher, local_files_only=True))
    read = sorted(path for part in components(index) for path in (folder / part).rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in read}
    base = Base(str(folder), None, files) if is_folder else Base(teacher, folder.name, files)
    for name in TOKENIZERS[family].values():
        if (folder / name).is_dir():
            shutil.copytree(folder / name, out / name, dirs_exist_ok=True)
    own = SimpleNamespace()
    shift_no_more(own)
    own.scheduler.save_pretrained(out / "scheduler")
    index["scheduler"] = ["diffusers", type(own.scheduler).__name__]
    index.pop("_name_or_path", None)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    (out / BASE).write_text(json.dumps(asdict(base), indent=2) + "\n", "utf-8")


def _fit_fp16(pipe: Any) -> bool:
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    tensors = (value for module in modules for value in module.state_dict().values() if value.is_floating_point())
    return all(float(value.abs().max()) <= FP16_MAX for value in tensors if value.numel())


UNTRAINED = (
    "No checkpoint of this run had a better held-out score than the start and enough diversity: the student has the "
    "weights that it began with."
)


def write(
    out: Path, setup: Setup, table: Sequence[Evaluation], pictures: Mapping[str, Tensor], chosen_at: int
) -> Student:
    """Write manifest, card and pictures beside the pipeline that ``save`` wrote; the run's own files are in ``run``.

    ``table`` has the teacher's rows, then the student's; ``chosen_at`` is the step whose weights were kept.
    """
    (out / CALIBRATION).write_text("\n".join(setup.prompts.calibration[:PROOF_PROMPTS]) + "\n")
    student = write_student(out, manifest(setup, table, chosen_at))
    figures.grid(pictures, out / "grid.png")
    figures.curves(read_log(out / "run" / "log.jsonl"), out / "curves.png")
    alarms = written.read_text().splitlines() if (written := out / "run" / "alarms.txt").exists() else []
    teacher = origin(setup.config.model)
    if teacher.terms:
        shutil.copyfile(teacher.terms, out / teacher.terms.name)
    text = card(student, setup.config, table, setup.rewards, teacher, read_index(out), alarms, setup.prompts.test)
    (out / "README.md").write_text(text)
    return student


def manifest(setup: Setup, table: Sequence[Evaluation], chosen_at: int) -> Student:
    """The content of student.json."""
    config, model, shape = setup.config, setup.model, setup.latents.shape
    rows = [row for row in table if row.label == "student"]
    known = {
        term.name: (role, term, term.calibration)
        for role in ROLES
        for term in setup.rewards[role].terms
        if term.calibration
    }
    return Student(
        id=config.student.id,
        version=config.student.version,
        family=model.name,
        steps=config.student.nfe,
        sigmas={nfe: model.sigmas(nfe, shape) for nfe in config.student.nfe},
        latents=setup.latents,
        image=setup.image,
        max_tokens=model.max_tokens,
        baked=model.baked,
        teacher=origin(config.model).name,
        scorers={
            name: Scorer(f"scorers/{name}.onnx", kept.mean, kept.std, role, term.source, _named(term.asked))  # type: ignore[arg-type]
            for name, (role, term, kept) in known.items()
        },
        reward_reference={name: _reference(rows, name, kept) for name, (_, _, kept) in known.items()},
        within_prompt=_within_prompt(rows, {name: kept for name, (_, _, kept) in known.items()}),
        evaluation=tuple(_row(setup, row) for row in table),
        chosen_at=chosen_at,
        schedule=by_size(model.scheduler_config),
    )


def _named(asked: str) -> str | None:
    """The name by which serving opens a reward; None for a scorer's folder, which is only served compiled."""
    return None if Path(asked.removeprefix("shapes:")).is_dir() else asked


def _reference(rows: Sequence[Evaluation], name: str, kept: Calibration) -> RewardReference:
    """The distribution of the student's own scores at each of its step counts; the first stands for all."""
    found = None
    for row in rows:
        found = with_distribution(found, str(row.nfe), distribution(kept.standardise(row.scores[name])))
    assert found is not None
    return found


def _within_prompt(rows: Sequence[Evaluation], known: Mapping[str, Calibration]) -> dict[str, WithinPrompt] | None:
    """How scores vary within a prompt at each of the student's step counts, on the pictures drawn for diversity."""
    found = {}
    for row in rows:
        scores = {name: [kept.standardise(group) for group in row.varied[name]] for name, kept in known.items()}
        if scores and len(row.diversity) > 1:
            found[str(row.nfe)] = within_prompt.measure(scores)
    return found or None


def _row(setup: Setup, row: Evaluation) -> dict[str, Any]:
    values = {role: weighted.of_raw(row.scores) for role, weighted in setup.rewards.items()}
    values |= {f"judge_{name}": list(part) for name, part in row.judge.items()}
    values |= {DIVERSITY: row.diversity, **row.diversities}
    figures_of = {
        name: dict(zip(("mean", "error"), mean_error(part, setup.prompts.test[: len(part)]), strict=True))
        for name, part in values.items()
    }
    num = len(values[TRAINED])
    return {"model": row.label, "nfe": row.nfe, "guidance": row.guidance, "prompts": num, **figures_of}
