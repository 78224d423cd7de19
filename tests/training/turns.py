"""Run under torchrun by test_evaluate: an evaluation that two processes share, against that of one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from student.families.find import open_family
from tests.student.families import tiny
from tests.training.test_evaluate import MEASURE, PROMPTS
from training.evaluate import Evaluation, Plan, cached, in_turns
from training.processes import LONGEST_WAIT, process_group, state
from training.sampler import Sampler


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    here = state()
    group: Any = distributed.group.WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout == LONGEST_WAIT
    worked: list[int] = []

    def work(part: int) -> tuple[int, int]:
        worked.append(part)
        return part, here.process_index

    assert in_turns(range(5), work) == [(i, i % 2) if i < 4 else (4, 0) for i in range(5)]
    assert worked == ([0, 2, 4] if here.process_index == 0 else [1, 3, 4]), worked
    family = open_family(folder / "flux", max_tokens=tiny.MAX_TOKENS)
    drawn: list[int] = []
    family.decode = lambda x, decode=family.decode: (drawn.append(len(x)), decode(x))[1]  # type: ignore[method-assign]
    shape = family.latent_shape(32, 32)
    sampler, plan = Sampler(family, family.sigmas(3, shape)), Plan(PROMPTS, PROMPTS[:3], shape, 2)
    own = folder / f"cache-{here.process_index}"  # as on two machines with a disk each
    found = cached(own, "key", lambda: MEASURE.evaluate("student", sampler, plan))
    assert asdict(found) == json.loads((folder / "one.json").read_text())
    assert len(drawn) == 3 + 2 * 4, drawn  # 6 batches, and 3 prompts of 4 batches that come out as 4, for two
    again = cached(own, "key", lambda: Evaluation("new", 0, 0.0, {}, {}, []))
    assert again.label == "student" and (own / "key.json").exists() == here.is_main_process


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
