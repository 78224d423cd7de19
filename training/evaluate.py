"""Evaluates a model by scorers, exact judge and diversity, on fixed prompts and seeds.

Nothing here selects a checkpoint: selection uses the validation prompts, a student's published figures are the
``Evaluation`` on test prompts. Pictures are measured batch by batch and then freed; the processes share the batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from training.disk import unless_full
from training.processes import Processes, kind_of, state
from training.progress import steps
from training.sampler import Sampler
from training.sharding import unsharded
from training.termination import stop_if_asked

FloatArray = NDArray[np.float64]
ScoreFn = Callable[[Tensor, Sequence[str]], Tensor]
FeaturesFn = Callable[[Tensor], Tensor]
Rows = dict[str, list[float]]
Groups = dict[str, list[list[float]]]
JudgeFn = Callable[[Tensor, Sequence[str]], dict[str, list[float]]]
Part = TypeVar("Part")
Answer = TypeVar("Answer")
DIVERSITY, DIVERSITY_SEEDS = "diversity", 8
CACHE = Path.home() / ".cache" / "fewstep" / "evaluation"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy")
FORMAT = 3  # of what is kept: raised when the same models, prompts and sizes would give other figures


@dataclass(frozen=True)
class Evaluation:
    """One sampler's figures: per-prompt values, so that differences can be paired.

    ``scores[name][i]`` is prompt i's raw score, ``judge[name][i]`` is 1 where that part is right,
    ``diversity[i]`` the Vendi score of 8 seeds of prompt i on the autoencoder's latents, ``diversities[name][i]`` that
    on other features, and ``varied[name][i]`` the raw scores of these pictures.
    """

    label: str
    nfe: int
    guidance: float
    scores: Mapping[str, list[float]]
    judge: Mapping[str, list[float]]
    diversity: list[float]
    varied: Mapping[str, list[list[float]]] = field(default_factory=dict)
    diversities: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What an evaluation generates: ``prompts[i]`` with seed ``first_seed + i``, and 8 seeds of each of ``varied``.

    ``shape`` is that of one picture's latents. ``batch`` pictures are generated at a time, which changes no more than
    the rounding of the figures.
    """

    prompts: Sequence[str]
    varied: Sequence[str]
    shape: tuple[int, ...]
    batch: int
    first_seed: int = 0
    varied_seed: int = 100_000

    def seeds(self) -> list[int]:
        """One seed for each of ``prompts``."""
        return [self.first_seed + i for i in range(len(self.prompts))]

    def key(self) -> str:
        """Everything in the plan that the figures depend on, as a string."""
        kept = {name: value for name, value in asdict(self).items() if name != "batch"}
        return json.dumps([FORMAT, DIVERSITY_SEEDS, kept], sort_keys=True)


@dataclass(frozen=True)
class Measure:
    """The instruments: scorers by name, the judge, and the function that turns images into features for diversity.

    ``more_features`` are others, by the name of the diversity on them; ``version`` is a string of what these depend on.
    """

    scorers: Mapping[str, ScoreFn]
    judge: JudgeFn | None
    features: FeaturesFn
    more_features: Mapping[str, FeaturesFn] = field(default_factory=dict)
    version: str = ""

    def evaluate(self, label: str, sampler: Sampler, plan: Plan) -> Evaluation:
        """Generate what the plan says, score and judge it, and compute the diversity."""

        def measured(_: int, images: Tensor, prompts: Sequence[str]) -> tuple[Rows, Rows]:
            scores = {name: score(images, prompts).double().tolist() for name, score in self.scorers.items()}
            return scores, self.judge(images, prompts) if self.judge else {}

        rows = over_pictures(sampler, plan.prompts, plan.seeds(), plan.shape, plan.batch, measured)
        scores, judged = (_joined([row[part] for row in rows]) for part in (0, 1))
        spread, varied = self._of_varied(sampler, plan, self.scorers)
        diversity = spread.pop(DIVERSITY)
        return Evaluation(label, len(sampler.sigmas), sampler.guidance, scores, judged, diversity, varied, spread)

    def diversity(self, sampler: Sampler, plan: Plan) -> list[float]:
        """The Vendi score of the DIVERSITY_SEEDS images of each of the plan's varied prompts."""
        return replace(self, more_features={}).diversities(sampler, plan)[DIVERSITY]

    def diversities(self, sampler: Sampler, plan: Plan) -> dict[str, list[float]]:
        """The same on all features, by name; that on the latents is DIVERSITY."""
        return self._of_varied(sampler, plan, {})[0]

    def _of_varied(self, sampler: Sampler, plan: Plan, scorers: Mapping[str, ScoreFn]) -> tuple[Rows, Groups]:
        """The diversities, and the scores of the same images by each of ``scorers``."""
        kinds = {DIVERSITY: self.features, **self.more_features}
        prompts = [prompt for prompt in plan.varied for _ in range(DIVERSITY_SEEDS)]
        # Whole groups, in as many calls as every other share's.
        share = max(DIVERSITY_SEEDS, plan.batch // DIVERSITY_SEEDS * DIVERSITY_SEEDS)

        def measured(first: int) -> tuple[Rows, Rows]:
            features: dict[str, list[Tensor]] = {name: [] for name in kinds}
            scores: Rows = {name: [] for name in scorers}
            for at in range(first, min(first + share, len(prompts)), plan.batch):
                texts = prompts[at : min(at + plan.batch, first + share)]
                seeds = [plan.varied_seed + at + i for i in range(len(texts))]
                images = sampler.draw(texts, seeds, plan.shape, plan.batch)
                for name, featured in kinds.items():
                    features[name].append(featured(images))
                with sampler.autocast():
                    for name, score in scorers.items():
                        scores[name] += score(images, texts).double().tolist()
            return {name: _spread(torch.cat(found)) for name, found in features.items()}, scores

        parts = in_turns(range(0, len(prompts), share), measured, f"diversity, {len(sampler.sigmas)} steps")
        spread, flat = (_joined([part[kind] for part in parts]) for kind in (0, 1))
        grouped = {name: np.reshape(values, (-1, DIVERSITY_SEEDS)).tolist() for name, values in flat.items()}
        return {name: spread.get(name, []) for name in kinds}, grouped


def _spread(features: Tensor) -> list[float]:
    """The Vendi score of each group of DIVERSITY_SEEDS pictures."""
    features_ND = features.flatten(1).double().numpy()
    return [vendi(group) for group in np.split(features_ND, len(features_ND) // DIVERSITY_SEEDS)]


def _joined(rows: Sequence[Rows]) -> Rows:
    return {name: [value for row in rows for value in row[name]] for name in (rows[0] if rows else ())}


def over_pictures(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    shape: tuple[int, ...],
    batch: int,
    work: Callable[[int, Tensor, Sequence[str]], Answer],
) -> list[Answer]:
    """``work(at, images, prompts)`` for each batch of pictures, in order; ``at`` is the position of the first.

    The processes share the batches (``in_turns``); pictures are freed unless ``work`` keeps them.
    """

    def one(at: int) -> Answer:
        part = slice(at, at + batch)
        images = sampler.draw(prompts[part], seeds[part], shape, batch)
        with sampler.autocast():
            return work(at, images, prompts[part])

    return in_turns(range(0, len(prompts), batch), one, f"pictures, {len(sampler.sigmas)} steps")


def in_turns(parts: Sequence[Part], work: Callable[[Part], Answer], label: str = "pictures") -> list[Answer]:
    """``work`` for each part, in order; the processes take turns, and each of them gets all results.

    Every process makes the same number of calls and repeats the last part if they do not divide evenly: what is sharded
    over the processes (FSDP2) must be computed by all of them at once. ``label`` is the title of the progress bar.

    Raises:
        RunStopped: inside a run's training, where a process of it was asked to stop (SIGTERM).
    """
    here, processes = state(), Processes()
    size, turns = here.num_processes, -(-len(parts) // here.num_processes)
    counted = steps(label, 0, turns, passing=True, shown=here.is_main_process and turns > 1)
    mine = []
    for turn in counted:
        stop_if_asked(processes)
        mine.append(work(parts[min(turn * size + here.process_index, len(parts) - 1)]))
    if size == 1:
        return mine
    everyone: list[Answer] = gather_object(mine)
    return [everyone[i % size * turns + i // size] for i in range(len(parts))]


def vendi(features_ND: FloatArray) -> float:
    """Vendi score (Friedman and Dieng 2023): exp of the entropy of the cosine similarity's eigenvalues; 1 to N."""
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def mean_error(values: Sequence[float], prompts: Sequence[str] = ()) -> tuple[float, float]:
    """Mean and standard error of the mean; values of the same prompt are not independent of each other.

    With ``prompts``, one for each value, the error is clustered by prompt: G / (G - 1) times the sum over prompts of
    (sum of a prompt's deviations)^2, over N^2. If no prompt repeats, this is the ordinary standard error.
    """
    array = np.asarray(values, dtype=float)
    groups = np.unique(list(prompts), return_inverse=True)[1] if prompts else np.arange(len(array))
    sums = np.bincount(groups, array - array.mean())
    if len(sums) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(array)


def paired(a: Sequence[float], b: Sequence[float], prompts: Sequence[str] = ()) -> tuple[float, float]:
    """Mean and standard error of a - b, prompt by prompt; ``prompts`` as for ``mean_error``."""
    return mean_error(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), prompts)


def fingerprint(weights: str, sampler: Sampler, plan: Plan, measure: str) -> str:
    """A key of everything that an evaluation depends on: weights (``hash_model``), sampler, plan, measure, kind of
    device, precision and library versions."""
    model = sampler.model
    asked = [sampler.sigmas, sampler.guidance, sampler.negative, getattr(model, "guidance", None), model.max_tokens]
    asked += [second] if (second := getattr(model, "guidance_2", None)) else []
    parts = [weights, asked, plan.key(), measure, computed_with(sampler)]
    return fingerprint_of(parts)


def fingerprint_of(parts: Sequence[Any]) -> str:
    """A name for a folder or file of what depends on ``parts``, and on the libraries that compute."""
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    return hashlib.sha256(json.dumps([*parts, versions]).encode()).hexdigest()[:24]


def computed_with(sampler: Sampler) -> list[str]:
    """What numbers depend on beside the models and libraries: the kind of device, and the types."""
    types = [str(part.dtype) for part in (sampler.model.transformer, sampler.model.vae)]
    return [kind_of(sampler.model.device), sampler.precision, *types]


def hash_model(model: nn.Module) -> str:
    """A sha256 of all weights that a family holds at the moment (its text encoders may have been dropped)."""
    digest = hashlib.sha256()
    add_weights(digest, model.state_dict())
    return digest.hexdigest()


def add_weights(digest: hashlib._Hash, weights: Mapping[str, Tensor]) -> None:
    """Add named tensors to a hash, whichever device they are on and however they are sharded."""
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        for part in _plain(unsharded(value).detach()):
            digest.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())


def _plain(value: Tensor) -> list[Tensor]:
    """The tensor itself, or those that a quantised one (torchao) is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(value, name))]


def cached(folder: Path, key: str, make: Callable[[], Evaluation]) -> Evaluation:
    """The evaluation cached under ``key``, or a new one; the first process decides for all."""
    path = folder / f"{key}.json"
    here = state()
    found = [json.loads(path.read_text()) if here.is_main_process and path.exists() else None]
    if here.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        return Evaluation(**found[0])
    result = make()
    if here.is_main_process:
        with unless_full("a copy of these figures", path):
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # several runs may write the same figures
            try:
                part.write_text(json.dumps(asdict(result)))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    return result
