"""Which candidate of each image is kept: pure rules over what was drawn, in this round and in the ones before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.queue.rounds import Round
from service.worker.floor import Floor
from service.worker.scoring import Judged


@dataclass(frozen=True)
class Kept:
    """What an image is after a round: ``row`` of the round's pictures, or (None) the picture that it was before.

    ``about`` is its entry in the job's result; ``score`` that by which it was chosen (-inf: it has none).
    """

    row: int | None
    about: Mapping[str, Any]
    score: float = -math.inf


def select(drawn: Round, judged: Sequence[Judged], whole: Sequence[bool]) -> tuple[Kept | None, ...]:
    """The kept picture of each image of the job; None: every candidate of it is broken.

    ``judged`` and ``whole`` (its values are finite) are of the round's draws. The highest score wins, the earliest of
    equal ones; what has no score comes after all that have one, and what is broken is never kept.
    """
    kept: list[Kept | None] = []
    for image in range(len(drawn.asked.seeds)):
        before = drawn.best["images"][image] if drawn.best else None
        rows = [row for row, draw in enumerate(drawn.draws) if draw.image == image]
        if not rows:
            assert before is not None
            kept.append(Kept(None, before, score_of(before, drawn.asked.rank_by)))
        elif drawn.asked.rank_by:
            kept.append(_best(drawn, before, {row: _candidate(drawn, row, judged, whole) for row in rows}))
        else:
            (row,) = rows
            kept.append(Kept(row, {"seed": drawn.draws[row].seed, **judged[row].record()}) if whole[row] else None)
    return tuple(kept)


def score_of(about: Mapping[str, Any], scorer: str) -> float:
    """The score by which a candidate is chosen."""
    return -math.inf if about.get("broken") else float(about["reward"].get(scorer, -math.inf))


def with_earlier(drawn: Round, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a round together with what the rounds before it took."""
    if not drawn.best:
        return dict(result)
    before, now = drawn.best["timings"], result["timings"]
    timings = {name: seconds + before.get(name, 0.0) for name, seconds in now.items()}
    return {**result, "timings": timings, "batch_size": max(result["batch_size"], drawn.best.get("batch_size", 1))}


def with_floor(drawn: Round, result: Mapping[str, Any], kept: Sequence[Kept], floor: Floor) -> dict[str, Any]:
    """The same with the floor as it was last decided, and whether each picture is below the one that was asked for.

    After the last round nothing is decided: the floor stays that of the round before, which may have been lowered.
    """
    marked = [
        {**image, "below_floor": one.score < floor.asked_score}
        for image, one in zip(result["images"], kept, strict=True)
    ]
    before = drawn.best.get("floor") if floor.utilisation is None else None
    return {**result, "images": marked, "floor": before or floor.record()}


def _candidate(drawn: Round, row: int, judged: Sequence[Judged], whole: Sequence[bool]) -> dict[str, Any]:
    scores = judged[row].record()
    about = {"seed": drawn.draws[row].seed, "steps": drawn.stage.steps, "round": drawn.number + 1, **scores}
    return about if whole[row] else {**about, "reward": {}, "reward_percentile": {}, "broken": True}


def _best(drawn: Round, before: Mapping[str, Any] | None, new: Mapping[int, dict[str, Any]]) -> Kept | None:
    """The best of the candidates of one image so far."""
    scorer = drawn.asked.rank_by
    earlier: Sequence[dict[str, Any]] = before["candidates"] if before else []
    candidates, rows = [*earlier, *new.values()], [*[None] * len(earlier), *new]
    order = sorted(
        range(len(candidates)), key=lambda k: (bool(candidates[k].get("broken")), -score_of(candidates[k], scorer))
    )
    ranks = {k: rank for rank, k in enumerate(order, 1)}
    first = order[0]
    if candidates[first].get("broken"):
        return None
    ranked = [{**one, "rank": ranks[k]} for k, one in enumerate(candidates)]
    winner = {name: value for name, value in candidates[first].items() if name not in ("rank", "round")}
    others = {name: score for name, score in winner["reward"].items() if name != scorer}
    about = {**winner, "reported": others, "candidates": ranked}
    return Kept(rows[first], about, score_of(winner, scorer))
