"""How a run computes: its optimizer, its adapters, its types and devices, and how often it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import above_0, at_least, check, finite, one_of, share

DTYPES = ("bf16", "fp32")
QUANTISED = ("", "nf4", "fp8")
STATES = ("fp32", "offload", "8bit", "paged")
TILES_PX = 64  # what the side of a tile is a multiple of: three quarters of it are whole cells of every autoencoder


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, with a state in fp32 on the GPU ("fp32") or in main memory ("offload"); or by bitsandbytes in 8 bits, or
    "paged": moved to main memory where the GPU's is full. A step has ``batch`` x ``accumulate`` samples a process.
    """

    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 10
    decay: float = 0.0  # the share of the run over which the rate falls to 0
    clip_norm: float = 1.0
    state: str = "fp32"

    def __post_init__(self) -> None:
        one_of(STATES, "optim", self, "state")
        finite("optim", self, "lr", "decay", "clip_norm")
        at_least(1, "optim", self, "batch", "accumulate", "warmup")
        above_0("optim", self, "lr", "clip_norm")
        share("optim", self, "decay")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the attention and feed-forward layers of the blocks; rank 0 trains all weights."""

    rank: int = 0
    alpha: float = 64.0

    def __post_init__(self) -> None:
        finite("lora", self, "alpha")
        at_least(0, "lora", self, "rank")
        above_0("lora", self, "alpha")


@dataclass(frozen=True)
class ComputeConfig:
    """Where a run computes, in which types, and what it spends to save memory."""

    device: str = "auto"  # the GPU where there is one
    weights: str = "fp32"
    quantise: str = ""  # the base under adapters: "nf4" (bitsandbytes), "fp8" (torchao), or empty for ``weights``
    precision: str = "bf16"
    checkpointing: bool = False
    tile_px: int = 0  # the side of the tiles that the autoencoder works on, one after the other; 0: the whole picture
    shard: bool = False  # the transformers over the processes (FSDP2)
    shard_frugal: bool = False  # gather for each call, reduce after each: more traffic, no room for whole networks
    compile: str = ""  # the backend that compiles the transformer's blocks, such as inductor; empty: none
    save_minutes: float = 10.0  # a checkpoint at least so often, beside those at each validation

    def __post_init__(self) -> None:
        one_of(DTYPES, "compute", self, "weights", "precision")
        one_of(QUANTISED, "compute", self, "quantise")
        check(
            self.tile_px >= 0 and self.tile_px % TILES_PX == 0,
            f"compute.tile_px is {self.tile_px}: accepted are 0 and multiples of {TILES_PX}",
        )
        above_0("compute", self, "save_minutes")


@dataclass(frozen=True)
class ValidationConfig:
    """How often the student is measured, and what makes a checkpoint the best one."""

    every: int = 25
    patience: int = 0  # stop after so many validations without a better held-out score; 0 never
    min_diversity: float = 0.9  # no checkpoint is chosen with less of the teacher's diversity than this; 0 for any
    batch: int = 64  # pictures drawn at a time
    dinov2: str = ""  # a DINOv2 (folder or hub id): diversity is reported on its features too; none if empty

    def __post_init__(self) -> None:
        finite("validation", self, "min_diversity")
        at_least(1, "validation", self, "every", "batch")
        at_least(0, "validation", self, "patience")
        share("validation", self, "min_diversity")
