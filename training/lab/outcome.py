"""The primary outcome of docs/science.md, from results alone: the exact judge at equal diversity.

Legend: K stopping times of a sweep, P evaluation prompts, S training seeds, B resamples of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from training.config import ConfigError
from training.lab.cells import CONFIDENCE, CONSTANT, GATES, NFES, RATS, REWARD_ONLY, SEEDS, SHUFFLED
from training.lab.gates import STRATA, in_stratum
from training.lab.references import teacher_name
from training.lab.run import Result
from training.lab.statistics import Estimate, FloatArray, area, estimate, holm, resampled_counts
from training.lab.stops import Figures, Stop
from training.lab.teachers import GOOD

LOW, HIGH = 0.7, 1.0  # of the good teacher's diversity
LEVEL = 0.05
RESAMPLES = 2_000
BOTH = "both"


@dataclass(frozen=True)
class Claim:
    """One of the registered claims: ``ours`` beats ``theirs``; ``p_value`` is corrected for the number of claims."""

    letter: str
    ours: str
    theirs: str
    difference: Estimate
    p_value: float

    @property
    def verdict(self) -> str:
        """By the corrected p-value, on both sides."""
        if self.p_value > LEVEL:
            return "is not decided"
        return "holds" if self.difference.mean > 0 else "is contradicted"


@dataclass(frozen=True)
class Outcome:
    """All results, with the references that they are held against and the prompts of both.

    Raises:
        ConfigError: results of other prompts than the references'.
    """

    results: Sequence[Result]
    prompts: Sequence[str]
    references: Mapping[str, Figures]
    resamples: int = RESAMPLES
    _counts: dict[str, FloatArray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for result in self.results:
            if any(len(stop.figures.right) != len(self.prompts) for stop in result.stops):
                raise ConfigError(
                    f"{result.key} was measured on other prompts than the references: a trial (--steps) and the plan "
                    "need different folders"
                )

    def seeds(self, teacher: str, method: str) -> list[int]:
        """The training seeds of which a method has results."""
        return sorted({r.seed for r in self.results if r.teacher == teacher and r.method == method})

    def stops(self, teacher: str, method: str, seed: int, nfe: int) -> list[Stop]:
        """Every stopping time of a method's sweep that counts."""
        runs = [r for r in self.results if (r.teacher, r.method, r.seed) == (teacher, method, seed)]
        return [stop for run in runs for stop in counted(run) if stop.nfe == nfe]

    def points(
        self, stops: Sequence[Stop | Figures], stratum: str, counts_BP: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """The diversity, as a share of the good teacher's, and the judge of each: (B, K), or (K,) without counts."""
        of = [stop.figures if isinstance(stop, Stop) else stop for stop in stops]
        at = self._index[stratum]
        right_PK, diversity_PK = (
            np.array([getattr(figures, name) for figures in of])[:, at].T for name in ("right", "diversity")
        )
        teacher_P = np.array(self.references[teacher_name(GOOD)].diversity)[at]
        weights = np.ones(len(at)) if counts_BP is None else counts_BP
        share = weights @ diversity_PK / (weights @ teacher_P)[..., None]
        return share, weights @ right_PK / weights.sum(-1)[..., None]

    def area_of(self, figures: Figures, stratum: str = BOTH) -> float:
        """The area under a reference, which is one point."""
        return float(area(*self.points([figures], stratum), LOW, HIGH))

    def estimate(self, teacher: str, method: str, stratum: str = BOTH, minus: str = "") -> Estimate | None:
        """A method's area, or how far it is above that of the method ``minus`` with the same seeds."""
        seeds = self.seeds(teacher, method)
        if minus:
            seeds = [seed for seed in seeds if seed in self.seeds(teacher, minus)]
        if not seeds:
            return None
        measured_S, resampled_BS = self._areas(teacher, method, seeds, stratum)
        if minus:
            other_S, other_BS = self._areas(teacher, minus, seeds, stratum)
            measured_S, resampled_BS = measured_S - other_S, resampled_BS - other_BS
        return estimate(measured_S, resampled_BS, len(self._index[stratum]))

    def by_seed(self, teacher: str, method: str, stratum: str = BOTH) -> dict[int, float]:
        """A method's area for each of its training seeds."""
        sweeps = {
            seed: [self.stops(teacher, method, seed, nfe) for nfe in NFES] for seed in self.seeds(teacher, method)
        }
        return {
            seed: float(np.mean([area(*self.points(stops, stratum), LOW, HIGH) for stops in by_nfe]))
            for seed, by_nfe in sweeps.items()
        }

    def claims(self, teacher: str) -> list[Claim]:
        """The three registered claims, as far as all their seeds are there; corrected for three in any case."""
        gates = [name for name in GATES if len(self.seeds(teacher, name)) == len(SEEDS)]
        return self._decided(teacher, {"A": ([RATS], CONSTANT), "B": ([RATS], SHUFFLED), "C": (gates, REWARD_ONLY)})

    def added_claims(self, teacher: str) -> list[Claim]:
        """The three claims about the confidence gate, registered later; corrected for themselves."""
        ours = [CONFIDENCE]
        return self._decided(teacher, {"D": (ours, RATS), "E": (ours, CONSTANT), "F": (ours, REWARD_ONLY)})

    def _decided(self, teacher: str, asked: Mapping[str, tuple[Sequence[str], str]]) -> list[Claim]:
        found: dict[str, tuple[str, str, Estimate, float]] = {}
        for letter, (ours, theirs) in asked.items():
            leads = {name: lead for name in ours if (lead := self.estimate(teacher, name, minus=theirs)) is not None}
            leads = {name: lead for name, lead in leads.items() if lead.seeds == len(SEEDS)}
            if leads:
                best = max(leads, key=lambda name: leads[name].mean)
                # The best of several is compared as one of several (Bonferroni).
                found[letter] = best, theirs, leads[best], min(1.0, len(leads) * leads[best].p_value)
        corrected = holm([found[letter][3] if letter in found else 1.0 for letter in asked])
        return [
            Claim(letter, *found[letter][:3], p)
            for letter, p in zip(asked, corrected, strict=True)
            if letter in found
        ]  # fmt: skip

    def _areas(self, teacher: str, method: str, seeds: Sequence[int], stratum: str) -> tuple[FloatArray, FloatArray]:
        """Each seed's area on all prompts (S,) and on each resample of them (B, S): the mean over the step counts."""
        counts_BP = self._resampled(stratum)
        measured_SN, resampled_SNB = [], []
        for seed in seeds:
            sweeps = [self.stops(teacher, method, seed, nfe) for nfe in NFES]
            measured_SN.append([area(*self.points(stops, stratum), LOW, HIGH) for stops in sweeps])
            resampled_SNB.append([area(*self.points(stops, stratum, counts_BP), LOW, HIGH) for stops in sweeps])
        return np.array(measured_SN).mean(1), np.array(resampled_SNB).mean(1).T

    def _resampled(self, stratum: str) -> FloatArray:
        """The same resamples for every method, so that differences are paired."""
        if stratum not in self._counts:
            self._counts[stratum] = resampled_counts(len(self._index[stratum]), self.resamples)
        return self._counts[stratum]

    @cached_property
    def _index(self) -> dict[str, FloatArray]:
        """The places of each stratum's prompts."""
        found = {stratum: np.flatnonzero(in_stratum(self.prompts, stratum)) for stratum in STRATA}
        return {BOTH: np.arange(len(self.prompts)), **found}  # type: ignore[dict-item]


def counted(run: Result) -> list[Stop]:
    """The stopping times of a run that count: with reward only those up to the best one by the selecting scorer."""
    if run.method != REWARD_ONLY:
        return run.stops
    last = max(run.stops, key=lambda stop: (stop.selecting, -stop.step)).step
    return [stop for stop in run.stops if stop.step <= last]
