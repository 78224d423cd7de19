"""What a request says about the quality of its pictures: best_of, rank_by, min_reward and cascade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest, TooLarge
from service.http.schema import SEED_LIMIT, GenerateRequest
from student.bundle import Student
from student.reference import reference_at, score_at
from student.runtimes.sizes import Size

MOST_DRAWN = 64  # pictures that one request may have drawn at a time: a larger one would hold up everybody's
STRIDE = 2654435769  # 2^32 divided by the golden ratio: candidates of neighbouring seeds never meet


def candidates_of(body: GenerateRequest) -> int:
    """How many pictures are drawn for each image, before it is known whether that is enough."""
    return body.best_of if body.min_reward is None else 1


def chooses(body: GenerateRequest) -> bool:
    """Whether pictures are chosen by a score."""
    return body.best_of > 1 or body.min_reward is not None


def check_quality(student: Student, body: GenerateRequest, scored: bool, size: Size) -> None:
    """Return if pictures of this size can be chosen as the request says; ``scored``: the service computes scores.

    Raises:
        InvalidRequest, TooLarge: they cannot, and why; ``param`` names the field.
    """
    if not chooses(body):
        alone = next((name for name in ("rank_by", "cascade") if getattr(body, name) is not None), None)
        if alone is not None:
            needed = "min_reward" if alone == "cascade" else "best_of or min_reward"
            raise InvalidRequest(f"{alone} has no effect without {needed}: send both, or neither.", alone)
        return
    field = "best_of" if body.best_of > 1 else "min_reward"
    if not student.scorers:
        raise InvalidRequest(f"{field} needs a score, and {student.id} has no scorer.", field)
    if not scored:
        raise InvalidRequest(f"{field} needs a score, and this service computes none (FEWSTEP_SCORE=off).", field)
    if body.rank_by is not None and body.rank_by not in student.scorers:
        known = ", ".join(sorted(student.scorers))
        raise InvalidRequest(f"rank_by is {body.rank_by[:80]!r}: {student.id} is scored by {known}.", "rank_by")
    if (most := body.count * candidates_of(body)) > MOST_DRAWN:
        message = f"{body.count} images of {body.best_of} candidates are {most}; one request may have {MOST_DRAWN}."
        raise TooLarge(message, "best_of")
    _check_floor(student, body, size)


def _check_floor(student: Student, body: GenerateRequest, size: Size) -> None:
    if body.min_reward is None:
        if body.cascade is not None:
            raise InvalidRequest("cascade has no effect without min_reward: send both, or neither.", "cascade")
        return
    if body.best_of == 1 and body.cascade is None:
        message = "min_reward needs best_of or cascade: they say what may be generated instead of an image below it."
        raise InvalidRequest(message, "min_reward")
    if body.cascade is not None:
        _check_cascade(student, body, body.cascade)
    if isinstance(body.min_reward, str):
        known = reference_at(student, scorer_of(student, body), first_steps(student, body), size)
        if known is None or score_at(known, 50) is None:
            message = (
                f"min_reward is {body.min_reward}, and {student.id} does not say how its own images score: "
                "send a number."
            )
            raise InvalidRequest(message, "min_reward")


def _check_cascade(student: Student, body: GenerateRequest, cascade: list[int]) -> None:
    if body.num_inference_steps is not None:
        raise InvalidRequest("cascade says the step counts: leave out num_inference_steps.", "num_inference_steps")
    if any(steps not in student.steps for steps in cascade):
        trained = ", ".join(map(str, sorted(student.steps)))
        raise InvalidRequest(f"cascade is {cascade}: {student.id} was trained for {trained}.", "cascade")
    if sorted(set(cascade)) != cascade:
        raise InvalidRequest(f"cascade is {cascade}: its step counts must grow.", "cascade")


def scorer_of(student: Student, body: GenerateRequest) -> str:
    """The scorer that chooses."""
    return body.rank_by or default_scorer(student)


def default_scorer(student: Student) -> str:
    """The scorer that chooses unless another is named: one that the student was trained on, so that a held-out one is
    left to tell what that has gained."""
    trained = [name for name, scorer in student.scorers.items() if scorer.role == "trained"]
    return sorted(trained or student.scorers)[0]


def first_steps(student: Student, body: GenerateRequest) -> int:
    """The step count that every image is drawn with, whatever comes after."""
    return body.cascade[0] if body.cascade else body.num_inference_steps or student.steps[0]


def job_fields(student: Student, body: GenerateRequest, seeds: tuple[int, ...]) -> Mapping[str, Any]:
    """What a job says of it, every candidate's seed among it; nothing where nothing is chosen.

    Candidate c of an image is ``seed + c * STRIDE`` mod 2^32: the first is the image's own, and more candidates never
    change those that were there before.
    """
    if not chooses(body):
        return {}
    tried = body.best_of * len(body.cascade or (1,))
    return {
        "candidates": body.best_of,
        "candidate_seeds": tuple(tuple((seed + c * STRIDE) % SEED_LIMIT for c in range(tried)) for seed in seeds),
        "rank_by": scorer_of(student, body),
        "min_reward": body.min_reward,
        "cascade": tuple(body.cascade or ()),
    }
