"""``python -m benchmarks.run_calls``: how often a run of each preset calls the transformer, evaluation included.

Computed from the configuration. ``make docs`` puts the table into docs/cost.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import changed
from training.experiment.presets import PRESETS
from training.rats.config import RatsConfig

GRADIENT, ROLLOUT = 4, 1  # calls that one step of the student counts as, with gradient and without
DIVERSITY_SEEDS, SHOWN = 8, 8  # pictures of a prompt whose diversity is measured; pictures for the card
EMBEDDED = frozenset({"flux-dev"})  # whose guidance is an input of the transformer, and takes no second call
STARTER, VIDEOS = {"calibration": 128, "validation": 256, "validation_diversity": 32, "test": 512}, 8
HEAD = (
    "| preset | training | calibration | teacher's diversity | validations | evidence | evaluation's share "
    "| as the preset evaluates |\n| --- | --: | --: | --: | --: | --: | --: | --: |"
)


@dataclass(frozen=True)
class Calls:
    """Calls of the transformer for one picture or video, by the part of a run."""

    training: int
    calibration: int
    diversity: int
    validations: int
    evidence: int

    @property
    def evaluation(self) -> int:
        """All but training."""
        return self.calibration + self.diversity + self.validations + self.evidence

    @property
    def share(self) -> float:
        """The part of a run that is evaluation."""
        return self.evaluation / (self.evaluation + self.training)


def count(config: RatsConfig, embedded: bool) -> Calls:
    """The calls of a run with one step count and a detached gradient."""
    teacher, data, (nfe,) = config.teacher, config.data, config.student.nfe
    guided = 1 if embedded or teacher.guidance == 1.0 else 2
    followed = min(teacher.guided_steps, config.steps)  # afterwards the teacher is not guided
    samples = config.optim.batch * config.optim.accumulate
    teaching = teacher.nfe * (followed * guided + (config.steps - followed))
    learning = config.steps * nfe * (GRADIENT + ROLLOUT)
    pictures = data.validation + DIVERSITY_SEEDS * data.validation_diversity
    validations = config.steps // config.validation.every + 1
    shown = data.test + DIVERSITY_SEEDS * data.test_diversity + SHOWN
    reference = teacher.reference_nfe * guided
    return Calls(
        training=samples * (teaching + learning),
        calibration=data.calibration * reference,
        diversity=DIVERSITY_SEEDS * data.validation_diversity * reference,
        validations=validations * (pictures + data.validation_diversity) * nfe,  # and its velocities
        evidence=shown * (reference + nfe * guided + nfe),
    )


def at_starter_size(config: RatsConfig) -> RatsConfig:
    """The same run with an evaluation as large as the starter world's; of videos, fewer for their diversity."""
    varied = VIDEOS if config.image.frames > 1 else RatsConfig().data.test_diversity
    return changed(config, {**{f"data.{name}": num for name, num in STARTER.items()}, "data.test_diversity": varied})


def row(name: str) -> str:
    """A preset's row of the table."""
    config, embedded = PRESETS[name](), name in EMBEDDED
    full, own = count(at_starter_size(config), embedded), count(config, embedded)
    cells = [f"{full.training:,}", f"{full.calibration:,}", f"{full.diversity:,}"]
    cells += [f"{full.validations:,}", f"{full.evidence:,}", f"{full.share:.0%}", f"{own.share:.0%}"]
    return f"| `{name}` | {' | '.join(cell.replace('%', ' %') for cell in cells)} |"


def table() -> str:
    """The presets of published models, in their order."""
    starter = RatsConfig().model
    return "\n".join([HEAD, *(row(name) for name, make in PRESETS.items() if make().model != starter)])


if __name__ == "__main__":
    print(table())
