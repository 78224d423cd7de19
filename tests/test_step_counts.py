"""What one optimizer step of the trainer really calls, counted on a make-believe device, is what the documents say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.counted_step import DOUBLE, SINGLE, count
from benchmarks.full_size import MODELS, without_weights
from benchmarks.step_counts import CASES, NETWORKS, Network, counts
from tests.alone import alone
from training.config import changed
from training.processes import BUCKET_BYTES, buckets
from training.rats.adapters import Lora, add_adapters, pairs

SMALL: Mapping[str, Any] = {"teacher.nfe": 3, "teacher.batch": 2, "student.nfe": (2,), "optim.accumulate": 3}


@alone
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # FLUX's blocks return views, which nothing changes in place
@pytest.mark.parametrize(
    ("at", "naive"), [(0, False), (0, True), (1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_a_step_calls_what_the_closed_form_says(at: int, naive: bool) -> None:
    config, guided = changed(CASES[at].config, SMALL), NETWORKS[CASES[at].preset].guided
    adapters = 2 * (12 * DOUBLE + 5 * SINGLE)
    small = Network(DOUBLE + SINGLE, adapters, buckets=1, guided=guided)
    assert count(config, guided, naive) == counts(config, small, naive)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_documents_counts_are_the_published_ones(name: str) -> None:
    known, transformer = NETWORKS[name], without_weights(MODELS[name]).transformer
    blocks = [part for part in transformer.modules() if type(part).__name__ in transformer._no_split_modules]
    with torch.device("meta"):
        add_adapters([transformer], Lora(32, 64.0))
    learnt: list[nn.Parameter] = [parameter.float() for parameter in pairs(transformer)[0]]  # type: ignore[misc]
    assert (len(blocks), len(learnt)) == (known.blocks, known.adapters)
    assert len(buckets(learnt, BUCKET_BYTES)) == known.buckets
    assert known.guided == (not getattr(transformer.config, "guidance_embeds", False))
