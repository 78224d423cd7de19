"""The configuration of a RATS run: nested, frozen, and checked on construction.

What the paper (arXiv 2604.14910) does not publish is our own choice: alpha, tau, the weights of the shaping terms, the
EMA decay, the learning rate, and the horizons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from student.bundle import NAME
from training.compute import DTYPES, ComputeConfig, LoraConfig, OptimConfig, ValidationConfig
from training.config import ConfigError, above_0, at_least, check, finite, one_of, share
from training.former_keys import FORMER_KEYS
from training.rats.gradients import MODES
from training.rats.trajectory import named_horizons
from training.tracker import TRACKERS

METHODS = ("rats", "tune", "consistency", "matching")
GATES = ("reward", "confidence", "constant", "one", "batch_mean", "shuffled", "signed", "disagreement")
BUNDLES = ("whole", "adapter")
SHAPES = "shapes"


@dataclass(frozen=True)
class DataConfig:
    """Prompts: where they come from, and how many (at most: a file may hold fewer) are used for which measurement."""

    prompts: str = SHAPES  # the starter world's, or a file: text with one a line, or .jsonl with a "prompt" key
    copies: int = 10  # of a prompt of lowest ``percentile`` in one pass; 1 draws all prompts equally often
    measuring: str = ""  # a second file to evaluate on; without it some of ``prompts`` are held out
    calibration: int = 128
    validation: int = 256
    validation_diversity: int = 32  # of the validation prompts
    test: int = 512
    test_diversity: int = 64  # of the test prompts
    max_tokens: int = 12  # of the T5 encoder; 0 takes the pipeline's own

    def __post_init__(self) -> None:
        at_least(2, "data", self, "calibration")
        at_least(1, "data", self, "copies", "validation", "validation_diversity", "test", "test_diversity")
        at_least(0, "data", self, "max_tokens")


@dataclass(frozen=True)
class ImageConfig:
    """The size of the images or videos."""

    height_px: int = 64
    width_px: int = 64
    frames: int = 1

    def __post_init__(self) -> None:
        at_least(1, "image", self, "height_px", "width_px", "frames")


@dataclass(frozen=True)
class StudentConfig:
    """The student's name, and its step counts; each optimizer step picks one of them at random."""

    id: str = "shapes"
    version: str = "1"
    nfe: tuple[int, ...] = (4,)
    init: str = ""  # its initial weights: a pipeline (a few-step checkpoint, a student), or a LoRA; empty: its teacher
    bundle: str = "whole"  # "adapter": only that, and the name of the teacher, which must be present where it is served

    def __post_init__(self) -> None:
        one_of(BUNDLES, "student", self, "bundle")
        for name, value in (("id", self.id), ("version", self.version)):
            check(
                NAME.fullmatch(value) is not None,
                f"student.{name} is {value!r}: accepted are up to 64 characters out of a to z, digits, '.', '_' and "
                "'-', starting with a letter or digit",
            )
        check(
            bool(self.nfe) and min(self.nfe, default=0) >= 1 and len(set(self.nfe)) == len(self.nfe),
            f"student.nfe is {self.nfe}: accepted is a list of distinct step counts, each 1 or more",
        )


@dataclass(frozen=True)
class TeacherConfig:
    """While ``step < guided_steps`` the teacher is the frozen start, guided; afterwards the student's EMA, unguided.

    Where a model takes guidance as an input (FLUX.1-dev), ``guidance`` is that, for the student too, in one velocity.
    """

    nfe: int = 16
    reference_nfe: int = 50  # the step count at which the teacher is evaluated
    guidance: float = 1.0
    guidance_2: float = 0.0  # of a second expert, at sigmas below its boundary; 0: as ``guidance``
    negative_prompt: str = ""  # what the guidance points away from
    guided_steps: int = 0
    restart: bool = True  # the average begins, after guided_steps, as the student; else it goes on from the start
    ema: float = 0.999  # 1 freezes the teacher at its start
    batch: int = 0  # samples that it rolls out at once, across micro-batches; 0: one micro-batch
    weights: str = "fp32"  # of the frozen start where all weights are trained; bf16 takes half of its memory

    def __post_init__(self) -> None:
        one_of(DTYPES, "teacher", self, "weights")
        finite("teacher", self, "guidance", "guidance_2", "ema")
        at_least(1, "teacher", self, "nfe", "reference_nfe")
        at_least(0, "teacher", self, "guided_steps", "batch")
        share("teacher", self, "ema")
        check(
            not self.guidance_2 or self.guidance != 1.0,
            f"teacher.guidance_2 is {self.guidance_2} with teacher.guidance 1: accepted with another teacher.guidance",
        )


@dataclass(frozen=True)
class RewardConfig:
    """Rewards by role, each NAME or NAME:WEIGHT,NAME:WEIGHT (rewards/registry.py)."""

    trained: str = "models/shapes-scorers/trained"
    heldout: str = "models/shapes-scorers/heldout"  # never trained on: chooses the checkpoint
    reported: str = ""  # neither trained on nor chosen by: in the card and the figures alone
    weight: float = 1.0
    hinge: float = math.inf  # rewards above it count as this value
    frames: int = 0  # latent frames of a video that are decoded for the reward at each step; 0 decodes all
    weights: str = "fp32"  # the type of the rewards' networks; bf16 takes half the memory

    def __post_init__(self) -> None:
        finite("reward", self, "weight")
        check(not math.isnan(self.hinge), f"reward.hinge is {self.hinge}: accepted is a finite number or Infinity")
        at_least(0, "reward", self, "weight", "frames")
        one_of(DTYPES, "reward", self, "weights")


@dataclass(frozen=True)
class ShapingConfig:
    """The regulariser towards the teacher's trajectory: alpha (gate x distance at the horizons + velocity hinge)."""

    alpha: float = 1.0
    steer: float = 0.0  # the share of the teacher's diversity that alpha is adjusted to keep; 0 leaves alpha fixed
    horizons: str = "student"  # its own sigmas; "end": the last state alone; or sigmas, such as "0.8,0.4,0"
    l2_weight: float = 1.0
    cosine_weight: float = 0.5
    velocity_hinge: float = math.inf  # largest ratio of the student's velocity norm to the teacher's without a penalty

    def __post_init__(self) -> None:
        finite("shaping", self, "alpha", "steer", "l2_weight", "cosine_weight")
        at_least(0, "shaping", self, "alpha")
        share("shaping", self, "steer")
        above_0("shaping", self, "velocity_hinge")
        try:
            named_horizons(self.horizons, (1.0,))
        except ValueError as error:
            raise ConfigError(f"shaping.{error}") from None


@dataclass(frozen=True)
class GateConfig:
    """How strongly a sample is shaped: "reward" by which of the two scores higher, "confidence" by the teacher's own
    reward (docs/confidence-gate.md), "constant" 0.5, "one" 1. Controls for "reward": "batch_mean" gives every sample
    of a micro-batch the mean weight, "shuffled" permutes the weights, "signed" is 2 g - 1: away from a worse teacher.
    "disagreement" is large where trained and held-out reward differ: then only ``reward.reported`` stays independent.
    """

    kind: str = "reward"
    tau: float = 1.0
    tau_in_std: bool = False  # tau times the running standard deviation of the gap

    def __post_init__(self) -> None:
        one_of(GATES, "gate", self, "kind")
        finite("gate", self, "tau")
        above_0("gate", self, "tau")


@dataclass(frozen=True)
class GradientConfig:
    """Which part of the student's rollout the gradient flows through (training/rats/gradients.py)."""

    mode: str = "full"
    last_k: int = 1
    bridge: float = 0.0  # of detached: the share of what a step does to later steps that is let in; 1 is the full one

    def __post_init__(self) -> None:
        one_of(MODES, "gradient", self, "mode")
        at_least(1, "gradient", self, "last_k")
        share("gradient", self, "bridge")
        check(
            not self.bridge or self.mode == "detached",
            f"gradient.bridge is {self.bridge} with gradient.mode {self.mode!r}: accepted is only detached",
        )


@dataclass(frozen=True)
class TuneConfig:
    """Method "tune": how far a target lies from what the average predicts, as a share of that picture's norm.

    ``branches`` are the pictures by which a reward without gradient is asked where to go; 0 takes its gradient.
    ``gate`` weighs each sample by the run's gate (``gate.kind``, ``gate.tau``), with the target in the teacher's place.
    """

    radius: float = 0.1
    branches: int = 0
    angle: float = 0.5  # between a branch's noise and the sample's own, in radians
    gate: bool = False

    def __post_init__(self) -> None:
        finite("tune", self, "radius", "angle")
        above_0("tune", self, "radius", "angle")
        check(
            self.branches == 0 or self.branches >= 2, f"tune.branches is {self.branches}: accepted is 0, or 2 or more"
        )


@dataclass(frozen=True)
class RatsConfig:
    """A run of ``steps`` optimizer steps from ``model`` (the folder or hub id of a diffusers pipeline) to a student.

    ``method`` is "rats"; "tune" for a model that draws in few steps already; or a peer that uses no reward:
    "consistency", "matching".
    """

    model: str = "models/shapes-teacher"
    method: str = "rats"
    steps: int = 300
    seed: int = 401
    tracker: str = "tensorboard"  # "wandb" or "mlflow" beside it
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    MOVED: ClassVar[Mapping[str, str]] = FORMER_KEYS

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward that is trained on must be differentiable."""
        return self.reward.weight > 0 and not (self.method == "tune" and self.tune.branches)

    def __post_init__(self) -> None:
        nfe, last_k = self.student.nfe, self.gradient.last_k
        one_of(METHODS, "", self, "method")
        one_of(TRACKERS, "", self, "tracker")
        at_least(1, "", self, "steps")
        check(0 <= self.seed < 2**32, f"seed is {self.seed}: accepted is 0 to 4294967295")
        check(
            self.gradient.mode != "last_k" or last_k <= min(nfe),
            f"gradient.last_k is {last_k}: accepted is 1 to the fewest steps of student.nfe, which is {nfe}",
        )
        check(
            not (self.compute.shard and self.method == "matching"),
            "compute.shard is true: accepted with every method except matching, whose critic is not sharded",
        )
        check(
            self.compute.weights != "bf16" or self.lora.rank > 0,
            "compute.weights is 'bf16' with lora.rank 0: small updates to bf16 weights round to nothing; accepted are "
            "a lora.rank of 1 or more, or compute.weights=fp32 (with compute.precision=bf16 it still computes in bf16)",
        )
        quantised, sharded = self.compute.quantise, self.compute.shard
        check(
            self.teacher.weights == "fp32" or (self.compute.precision == "bf16" and not self.lora.rank),
            "teacher.weights is 'bf16': accepted with compute.precision=bf16 and lora.rank=0",
        )
        check(
            not quantised or (self.lora.rank > 0 and self.compute.weights == "bf16" and not sharded),
            f"compute.quantise is {quantised!r}: accepted with a lora.rank of 1 or more, compute.weights=bf16, and "
            "without compute.shard",
        )
        check(
            not quantised or self.method != "matching",
            f"compute.quantise is {quantised!r}: accepted with every method but matching, which trains all weights",
        )
        check(
            self.optim.state in ("fp32", "offload") or not sharded,
            f"optim.state is {self.optim.state!r}: accepted with compute.shard are fp32, offload",
        )
        check(
            self.student.bundle == "whole" or (self.lora.rank > 0 and not self.student.init),
            "student.bundle is 'adapter': accepted with a lora.rank of 1 or more, and without student.init",
        )
        check(
            not self.shaping.steer or (self.method == "rats" and self.shaping.alpha > 0 and self.reward.weight > 0),
            f"shaping.steer is {self.shaping.steer}: it adjusts shaping.alpha, so it needs method=rats and a "
            "reward.weight and shaping.alpha above 0",
        )
        check(
            self.gate.kind != "disagreement" or (self.method == "rats" and not self.reward.frames),
            "gate.kind is 'disagreement': accepted with method=rats and reward.frames=0",
        )
        check(self.method != "tune" or self.reward.weight > 0, "reward.weight is 0: tune learns from the reward alone")
        check(
            self.reward.weight > 0 or self.shaping.alpha > 0,
            "reward.weight and shaping.alpha are both 0: there is nothing to train on",
        )
