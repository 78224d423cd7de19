"""The gate of a laboratory run, which also notes how it treats each stratum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.rats.config import RatsConfig
from training.rats.gate import Gate
from training.rats.method import Batch
from training.shapes.swapped import contains_either

SWAPPED, OTHERS = "star or heart", "others"
STRATA = (SWAPPED, OTHERS)


def in_stratum(prompts: Sequence[str], stratum: str) -> list[bool]:
    """Which prompts belong to a stratum."""
    return [contains_either(prompt) is (stratum == SWAPPED) for prompt in prompts]


class RecordedGate(Gate):
    """The weights are the gate's own; ``taken`` returns their means by stratum since it was last asked."""

    def __init__(self, config: RatsConfig) -> None:
        super().__init__(config)
        self._seen: dict[str, list[Tensor]] = {stratum: [] for stratum in STRATA}

    def weights(self, reward_T: Tensor, reward_S: Tensor, batch: Batch, second_S: Tensor | None = None) -> Tensor:
        """See Gate."""
        gate_B = super().weights(reward_T, reward_S, batch, second_S)
        both_2B = torch.stack([gate_B, reward_T - reward_S]).detach().float().cpu()
        for stratum, seen in self._seen.items():
            seen.append(both_2B[:, in_stratum(batch.prompts, stratum)])
        return gate_B

    def taken(self) -> dict[str, dict[str, float]]:
        """The mean weight and gap (teacher's reward minus the student's) of each stratum; none without steps."""
        found = {}
        for stratum, seen in self._seen.items():
            samples_2N = torch.cat(seen, 1) if seen else torch.empty(2, 0)
            if samples_2N.shape[1]:
                weight, gap = samples_2N.mean(1).tolist()
                found[stratum] = {"weight": weight, "gap": gap}
            seen.clear()
        return found
