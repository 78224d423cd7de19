"""A RATS run from its teacher to its bundle: trains, evaluates, and writes the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from student.base import ADAPTER, NETWORKS
from student.families.family import Family
from student.families.find import open_family
from student.families.two_experts import joined, transformer_of
from student.pipeline import open_parts, read_index
from training import checkpoint, environment
from training.decoder import decode_tiles
from training.evaluate import Evaluation
from training.experiment.setup import DTYPES, Setup, place, remember, student_start
from training.experiment.validation import test_figures, trainer
from training.processes import state
from training.progress import console
from training.quantise import quantise
from training.rats.trainer import CHECKPOINT
from training.result import UNTRAINED, save, save_beside_adapter, write
from training.rundir import FINISHED
from training.sampler import takes_guidance
from training.scorers import move
from training.sharding import shard


def run(setup: Setup, out: Path) -> None:
    """Train (or resume), write the bundle, evaluate what was written, and mark the run as finished."""
    config, here = setup.config, state()
    environment.write(out / "run" / "environment.json")
    if here.num_processes > 1 and here.is_main_process:  # each more makes another experiment of it, not a shorter one
        each = config.optim.batch * config.optim.accumulate
        sentence = f"{here.num_processes} processes: a step has {here.num_processes * each} samples, {each} of each"
        console.print(sentence, highlight=False)
    teachers, chosen_at = _train(setup, out)
    model = reopened(setup, out)
    students = [test_figures(setup, model, "student", nfe) for nfe in config.student.nfe]
    if here.is_main_process:
        table, shown = zip(*teachers, *students, strict=True)
        pictures = {f"{row.label}, {row.nfe} steps": drawn for row, drawn in zip(table, shown, strict=True)}
        write(out, setup, table, pictures, chosen_at)
        (out / "run" / FINISHED).write_text("")
        checkpoint.remove(out / "run" / CHECKPOINT)
        console.print(f"the student is in {out}; its card is {out / 'README.md'}")
        if chosen_at == 0:
            console.print(f"[bold red]{UNTRAINED}[/bold red]", highlight=False)


def _train(setup: Setup, out: Path) -> tuple[list[tuple[Evaluation, Tensor]], int]:
    """Train, and write the student's pipeline to ``out``; returns the teacher's figures and the chosen step."""
    training = trainer(setup, out / "run")
    training.run()
    move(setup.rewards, str(setup.model.device))
    counts = dict.fromkeys((setup.config.teacher.reference_nfe, *setup.config.student.nfe))
    with setup.roles.role("start") as model:
        found = [test_figures(setup, model, "teacher", nfe) for nfe in counts]
    setup.roles.gather(keep=training.is_first)
    if training.is_first:
        _save(setup, out)
    state().wait_for_everyone()
    return found, training.best_at


def _save(setup: Setup, out: Path) -> None:
    """The student's adapter, where it has one, and its pipeline, or what names that of its teacher."""
    config, roles = setup.config, setup.roles
    pipeline = getattr(diffusers, read_index(config.model, False)["_class_name"])
    if config.student.bundle == "adapter":
        roles.write_adapter(out / ADAPTER, pipeline)
        save_beside_adapter(out, config.model, setup.model.name)
        return
    if config.compute.quantise:
        roles.dequantise(_whole_base(setup))
    roles.merge(out / ADAPTER, pipeline)
    save(out, config.model, setup.model, config.compute.weights)


def _whole_base(setup: Setup) -> Any:
    """What the adapters of a quantised base were trained on, as it was before."""
    config = setup.config
    own = transformer_of(open_parts(config.model, (*NETWORKS, "scheduler"), DTYPES[config.compute.weights]))
    return student_start(config, own) or own


def reopened(setup: Setup, out: Path) -> Family:
    """The student as its bundle holds it: merged, and rounded to the type that it is kept in (or quantised to, where
    the run's base was: what it trained in is all that its device must hold).

    What trained is let go of before it is opened, and its transformer takes the trained one's place in ``setup.model``.
    """
    compute = setup.config.compute
    setup.roles.close()
    options: dict[str, Any] = {"max_tokens": setup.model.max_tokens}
    if takes_guidance(setup.model):
        options["guidance"] = setup.model.guidance
    model = joined(open_family(out, DTYPES[compute.weights], local_files_only=True, **options))
    setup.model.transformer = model.transformer
    if setup.prompts.of_file:
        remember(setup.config, model, setup.rewards, setup.prompts.test)
    quantise(model.transformer, compute.quantise)
    decode_tiles(model.vae, compute.tile_px)
    place(setup.config, model)
    if compute.shard and state().num_processes > 1:
        shard(model.transformer, state().num_processes)
    return model
