"""The weight of each sample: how far the other's reward is ahead of the student's, through a sigmoid.

Legend: B samples; suffixes S student, T teacher (or, where a model is tuned, the target).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from student.families.family import sent
from training.rats.config import RatsConfig
from training.rats.loss import confidence, disagreement, gate
from training.rats.method import Batch

CONSTANT_GATES = {"constant": 0.5, "one": 1.0}
SMALLEST_GAP_STD = 0.01  # of the teacher's: a step whose samples all have the same gap leaves tau above 0


class Gate:
    """The gate of a run, and the running standard deviation of the gap, which may be the unit of tau."""

    def __init__(self, config: RatsConfig) -> None:
        self.config, self._seed = config.gate, config.seed
        self.gap_std: float | None = None

    def weights(self, reward_T: Tensor, reward_S: Tensor, batch: Batch, second_S: Tensor | None = None) -> Tensor:
        """Of each sample (B,), by the configuration's kind; ``second_S`` is the held-out reward of the student's."""
        config = self.config
        if config.kind in CONSTANT_GATES:
            return torch.full_like(reward_T, CONSTANT_GATES[config.kind])
        tau = config.tau * (self.gap_std if config.tau_in_std and self.gap_std is not None else 1.0)
        if config.kind == "confidence":
            return confidence(reward_T, tau)
        if config.kind == "disagreement":
            assert second_S is not None
            return disagreement(reward_S, second_S, tau)
        gate_B = gate(reward_T, reward_S, tau)
        if config.kind == "batch_mean":
            return gate_B.mean().expand_as(gate_B)
        if config.kind == "shuffled":
            order = torch.randperm(len(gate_B), generator=batch.generator(self._seed * 7_000_003))
            return gate_B[sent(order, gate_B.device)]
        return 2 * gate_B - 1 if config.kind == "signed" else gate_B

    def figures(self, reward_T: Tensor, reward_S: Tensor, gate_B: Tensor) -> dict[str, Tensor | float]:
        """What a step logs of it."""
        gap_B = reward_S - reward_T
        return {
            "gap": gap_B.mean(),
            "gap_square": gap_B.square().mean(),
            "gate_mean": gate_B.mean(),
            "gate_square": gate_B.square().mean(),
            "share_ahead": (gap_B > 0).float().mean(),
        }

    def after_step(self, means: Mapping[str, float]) -> None:
        """Update the running standard deviation."""
        if "gap_std" in means:
            found = means["gap_std"] if self.gap_std is None else 0.9 * self.gap_std + 0.1 * means["gap_std"]
            self.gap_std = max(found, SMALLEST_GAP_STD)
