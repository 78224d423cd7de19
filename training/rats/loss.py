"""The RATS objective (arXiv 2604.14910) as pure functions of tensors.

Published: a sigma-aligned multi-horizon cosine and L2 shaping loss on predicted data, multiplied
by a reward-aware gate, plus the student's reward. Unpublished, and so our own choice: alpha, tau, the
weights of L2 and cosine, and the horizons. Shape suffixes: B batch, D everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.rats.trajectory import Trajectory

STEERING = 10  # of the lab's runs: alpha 2 and 20 ended a sixth of the diversity apart, which is (1 / 1.2)^13


def gate(reward_teacher_B: Tensor, reward_student_B: Tensor, tau: float) -> Tensor:
    """sigmoid((R_T - R_S) / tau), detached: near 1 where the teacher is better, 0.5 at equality.

    The figure on the authors' page prints the opposite sign; their text says that shaping is
    strengthened where the teacher is better, and we follow the text.

    Raises:
        ValueError: tau is not above 0.
    """
    if tau <= 0:
        raise ValueError(f"tau is {tau}: accepted is more than 0")
    return torch.sigmoid((reward_teacher_B - reward_student_B) / tau).detach()


def confidence(reward_teacher_B: Tensor, tau: float) -> Tensor:
    """sigmoid(R_T / tau), detached: near 1 where the teacher scores above its own mean, near 0 where below.

    Ours; no source. R_T is standardised, so 0 is the teacher's mean.

    Raises:
        ValueError: tau is not above 0.
    """
    return gate(reward_teacher_B, torch.zeros_like(reward_teacher_B), tau)


def disagreement(reward_B: Tensor, second_B: Tensor, tau: float) -> Tensor:
    """2 sigmoid(|R - R'| / tau) - 1, detached: 0 where two rewards agree about a sample, near 1 where one is alone.

    Where the rewards differ, neither is to be trusted, and the teacher is followed instead. Ours, after the
    uncertainty of GARDO (arXiv 2512.24138), which regularises uncertain samples only.

    Raises:
        ValueError: tau is not above 0.
    """
    return 2 * gate((reward_B - second_B).abs(), torch.zeros_like(reward_B), tau) - 1


def shaping(
    student: Trajectory, teacher: Trajectory, sigmas: Sequence[float], l2_weight: float, cosine_weight: float
) -> Tensor:
    """Mean over horizons of w_l2 * mse(x0_S, x0_T) + w_cos * (1 - cos(x0_S, x0_T)), for each sample: (B,)."""
    terms = [_distance(student.data(s), teacher.data(s).detach(), l2_weight, cosine_weight) for s in sigmas]
    return torch.stack(terms).mean(0)


def _distance(student_BD: Tensor, teacher_BD: Tensor, l2_weight: float, cosine_weight: float) -> Tensor:
    a, b = student_BD.flatten(1), teacher_BD.flatten(1)
    l2_B = (a - b).square().mean(1)
    cosine_B = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return l2_weight * l2_B + cosine_weight * (1 - cosine_B)


def steered(alpha: float, diversity: float, wanted: float) -> float:
    """alpha after a measurement of the student's diversity: raised below the target, lowered above it.

    alpha (wanted / diversity)^10: a tenth too little makes it 2.9 times as large. Ours; no source.
    """
    return alpha * (wanted / diversity) ** STEERING


def reward_loss(reward_student_B: Tensor, hinge: float = math.inf) -> Tensor:
    """-R_S for each sample; a reward above ``hinge`` counts as ``hinge`` and gives no gradient."""
    return -reward_student_B.clamp(max=hinge)


def velocity_excess(student: Trajectory, teacher: Trajectory, ratio: float) -> Tensor:
    """By how much the student's velocities exceed ``ratio`` times the teacher's norm at the same sigma: (B,).

    Mean over the student's steps of relu(|v_S| / |v_T| - ratio): oversharp, oversaturated images show here first.
    """
    if math.isinf(ratio):
        return torch.zeros(len(student.x[0]), device=student.x[0].device)
    terms = []
    for sigma, v_BD in zip(student.sigmas, student.v, strict=True):
        allowed_B = teacher.velocity(sigma).detach().flatten(1).norm(dim=1)
        terms.append(torch.relu(v_BD.flatten(1).norm(dim=1) / allowed_B - ratio))
    return torch.stack(terms).mean(0)
