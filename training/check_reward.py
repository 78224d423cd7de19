"""``python -m training.check_reward NAME``: can a student learn from this reward? A smoke test of its gradient.

Pictures of the starter world are scored; the gradient must reach the pixels, be finite and nonzero, and one step along
it must raise the score of every picture.

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewards.files import FILES
from rewards.gradient import pixel_gradient
from rewards.interface import Reward, RewardError, scored
from rewards.registry import find
from rewards.weighted import require_gradient
from training.endings import one_sentence
from training.evaluate import ScoreFn
from training.probe import pictures
from training.progress import quiet
from training.shapes import world

STEPS = (4.0, 2.0, 1.0, 0.5, 0.25)  # largest change of a pixel in one ascent step, in 1/255


@dataclass(frozen=True)
class Climb:
    """One step along the gradient: ``size`` is the largest change of a pixel, in 1/255.

    ``expected_B`` is the rise of the score that the gradient predicts, ``rise_B`` the actual one.
    """

    size: float
    expected_B: Tensor
    rise_B: Tensor


@dataclass(frozen=True)
class Check:
    """The result for the reward ``name``; ``largest_B`` is the largest gradient at any pixel of each picture."""

    name: str
    score_B: list[float]
    finite: bool
    largest_B: list[float]
    climb: Climb

    def problem(self) -> str | None:
        """What is wrong in one sentence, or None."""
        num = len(self.score_B)
        if not self.finite:
            return f"the gradient of reward {self.name!r} is not finite"
        if not all(self.largest_B):
            zero = sum(not value for value in self.largest_B)
            return f"the gradient of reward {self.name!r} is zero for {zero} of {num} pictures"
        fell = num - int((self.climb.rise_B > 0).sum())
        if fell:
            return f"a step along the gradient of reward {self.name!r} does not raise {fell} of {num} pictures' scores"
        return None


def check(
    name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[str], device: str | torch.device = "cpu"
) -> Check:
    """Score the images on ``device``, take the gradient, and climb one step.

    Raises:
        RewardError: the reward is a black box, or returns scores without a gradient or that are not finite.
    """
    require_gradient(name, reward)
    score = partial(scored, name, reward, device=device)
    score_B, gradient_BCHW = pixel_gradient(name, score, images_BCHW, prompts)
    finite = bool(gradient_BCHW.isfinite().all())
    largest_B = gradient_BCHW.abs().flatten(1).amax(1)
    climb = Climb(0.0, torch.zeros_like(score_B), torch.zeros_like(score_B))
    if finite and bool((largest_B > 0).all()):
        climb = _climb(score, images_BCHW, prompts, score_B, gradient_BCHW)
    return Check(name, score_B.tolist(), finite, largest_B.tolist(), climb)


def _climb(
    score: ScoreFn, images_BCHW: Tensor, prompts: Sequence[str], score_B: Tensor, gradient_BCHW: Tensor
) -> Climb:
    """The largest step that raises every score, or the smallest that was tried."""
    unit_BCHW = gradient_BCHW / gradient_BCHW.abs().amax((1, 2, 3), keepdim=True)
    for step in STEPS:
        change_BCHW = (images_BCHW + step / 255 * unit_BCHW).clamp(0, 1) - images_BCHW
        with torch.no_grad():
            rise_B = score(images_BCHW + change_BCHW, prompts) - score_B
        climb = Climb(step, (gradient_BCHW * change_BCHW).flatten(1).sum(1), rise_B)
        if bool((rise_B > 0).all()):
            break
    return climb


def table(result: Check) -> Table:
    """The figures as a table for the terminal."""
    climb, num = result.climb, len(result.score_B)
    shown = Table("figure", "value", title=f"{result.name} on {num} pictures")
    shown.add_row("mean score", f"{sum(result.score_B) / num:.4g}")
    shown.add_row("gradient is finite", "yes" if result.finite else "no")
    shown.add_row("largest gradient of a pixel, mean", f"{sum(result.largest_B) / num:.4g}")
    shown.add_row("step size (largest change of a pixel)", f"{climb.size}/255")
    shown.add_row("predicted rise of the score, mean", f"{float(climb.expected_B.mean()):.4g}")
    shown.add_row("actual rise of the score, mean", f"{float(climb.rise_B.mean()):.4g}")
    shown.add_row("pictures whose score rose", f"{int((climb.rise_B > 0).sum())} of {num}")
    return shown


def main(
    name: Annotated[str, typer.Argument(help="A shipped reward, a scorer's folder, or package.module:Class.")],
    size: Annotated[int, typer.Option(min=8, help="Side length of the pictures in pixels.")] = world.SIDE_PX,
    device: Annotated[str, typer.Option(help="Where the reward runs, such as cpu or cuda.")] = "cpu",
    num: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 8,
    tokenizer: Annotated[Path, typer.Option(help="For a scorer of the starter world: its teacher's tokenizer.")] = Path(
        "models/shapes-teacher/tokenizer"
    ),
    files: Annotated[Path, typer.Option(help="Folder of downloaded checkpoints.")] = FILES,
) -> None:
    """Test that a reward can be trained on: finite and nonzero gradient, and a step along it raises the score."""
    quiet()
    # Without a network the hub's client says so six times before it gives up.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with one_sentence(code=1):
        reward = find(name, tokenizer=tokenizer, files=files, device=device)
        images_BCHW, prompts = pictures(num, size, size)
        result = check(name, reward, images_BCHW, prompts, device)
        Console().print(table(result))
        problem = result.problem()
        if problem:
            raise RewardError(problem)


if __name__ == "__main__":
    typer.run(main)
