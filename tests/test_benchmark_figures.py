"""What the benchmarks of serving make of what they have seen: every figure has an answer key."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import check, drift_simulation, floor_under_load, growth, queue_rate, request_life
from benchmarks.floor_under_load import Course, Depth, Ended
from benchmarks.request_life import Span
from benchmarks.serving import measure
from benchmarks.serving.contenders import CONTENDERS, Form
from fewstep.load.drive import Outcome, Sample
from service.quality.drift import CAP, threshold


def test_arrivals_are_a_poisson_process_of_each_phases_rate() -> None:
    moments = floor_under_load.arrivals([(1000, 0.5), (2000, 0.0001), (1000, 2.0)], 0.25, 1)
    counts = np.histogram(moments, [0, 1000, 3000, 4000])[0]
    assert moments == sorted(moments) and len(moments) == sum(counts)
    for count, expected in zip(counts, (2000, 0.8, 8000), strict=True):
        assert abs(count - expected) < 4 * math.sqrt(expected) + 1
    gaps = np.diff(moments[: counts[0]])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "exponential gaps, not even ones"
    assert moments == floor_under_load.arrivals([(1000, 0.5), (2000, 0.0001), (1000, 2.0)], 0.25, 1)
    assert moments != floor_under_load.arrivals([(1000, 0.5), (2000, 0.0001), (1000, 2.0)], 0.25, 2)


def test_an_answer_says_how_far_the_floor_fell_and_what_was_drawn() -> None:
    pictures = [
        SimpleNamespace(candidates=[1, 2, 3], below_floor=True),
        SimpleNamespace(candidates=None, below_floor=None),
    ]
    answer: Any = SimpleNamespace(floor=SimpleNamespace(percentile=12.5, utilization=0.9), data=pictures)
    assert floor_under_load.ended(answer, 3.0, 0.5) == Ended(3.0, 0.5, 12.5, 0.9, 1.5, 0.5)
    answer.floor = SimpleNamespace(percentile=20.0)
    assert floor_under_load.ended(answer, 3.0, 0.5).utilization is None


def test_the_depth_is_the_sum_over_models() -> None:
    text = (
        '# TYPE fewstep_queue_depth gauge\nfewstep_queue_depth{m="a"} 2.0\nfewstep_queue_depth{m="b"} 3.0\nother 7.0\n'
    )
    assert floor_under_load.depth_in(text) == 5.0


def test_a_window_has_means_of_the_jobs_that_were_sent_in_it() -> None:
    jobs = [
        Ended(0.0, 1.0, 20.0, None, 1.0, 0.0),
        Ended(29.9, 2.0, 10.0, 0.5, 2.0, 0.5),
        Ended(10.0, 9.0, 5.0, 1.0, 3.0, 1.0),
        Ended(61.0, 4.0, 20.0, None, 1.0, 0.0),
    ]
    depths = [Depth(0, 1.0), Depth(29, 5.0), Depth(30, 99.0), Depth(60, 7.0)]
    arriving = 3 * floor_under_load.CALL_S / 30
    assert floor_under_load.rows_of(Course(jobs, depths)) == [
        ["0 to 30", f"{arriving:.2f}", "0.75", "p7.5", "2.00", "0.50", "3.0 (5)", "2.0"],
        ["60 to 90", f"{arriving / 3:.2f}", "–", "p20.0", "1.00", "0.00", "7.0 (7)", "4.0"],
    ]
    assert len(floor_under_load.HEAD) == 8 and pytest.approx(0.32) == floor_under_load.CALL_S


def spans(trace: bytes, moments: list[int], link: bytes) -> list[Span]:
    """Of one request: (http, send, job, draw, score, settle), each from a moment in microseconds to another."""
    http, send, sent, draw, drawn, scored, settled, answered = (1000 * moment for moment in moments)
    return [
        Span(trace, b"h", b"", (), "POST /generate", http, answered),
        Span(trace, b"s", b"h", (), "send job", send, sent),
        Span(trace, b"j", b"s", (link,), "process job", draw, settled),
        Span(b"batch" + link, b"d", link, (), "draw", draw, drawn),
        Span(b"batch" + link, b"c", link, (), "score", drawn, scored),
        Span(b"batch" + link, b"e", link, (), "settle", scored, settled),
    ]


def test_a_requests_life_is_the_times_between_its_spans() -> None:
    one = spans(b"1", [100, 103, 110, 125, 150, 182, 200, 217], b"x")
    ahead = spans(b"2", [1000, 1001, 1020, 1010, 1050, 1090, 1100, 1103], b"y")  # claimed before the reply was read
    incomplete = [span for span in spans(b"3", [1, 2, 3, 4, 5, 6, 7, 8], b"z") if span.name != "score"]
    names = list(request_life.STAGES)
    lives = request_life.lives([*one, *ahead, *incomplete])
    assert [list(life) for life in lives] == [names, names]
    assert [list(life.values()) for life in lives] == [
        [3.0, 7.0, 15.0, 25.0, 32.0, 18.0, 17.0, 117.0],
        [1.0, 9.0, 0.0, 40.0, 40.0, 10.0, 3.0, 103.0],
    ]
    assert request_life.lives([*one, *ahead], since_ns=1_000_000) == lives[1:]
    assert request_life.lives([*one, *ahead], since_ns=1_000_001) == []


def test_lives_are_shown_as_medians() -> None:
    lives = [dict.fromkeys(request_life.STAGES, value) for value in (1000.0, 3000.0, 1_234_567.0)]
    lines = request_life.table({1: lives, 8: lives[:1]}).splitlines()
    assert lines[0] == "| stage | 1 user, µs | 8 users, µs | |" and lines[1] == "|--|--:|--:|--|"
    assert [line.split(" | ")[:3] for line in lines[2:10]] == [
        [f"| {name}", "3,000", "1,000"] for name in request_life.STAGES
    ]
    assert lines[-1].startswith("Medians of 3 and 1 requests")


def sample(due_s: float, done_s: float, error: str | None = None) -> Sample:
    return Sample(due_s, done_s, Outcome(0 if error else 1, error))


class Server:
    """A server whose processor has worked 2 s more at each question."""

    def __init__(self) -> None:
        self.spent_s = 5.0

    def cpu_s(self) -> float:
        self.spent_s += 2.0
        return self.spent_s


def test_figures_of_a_closed_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [sample(0.0, 1.0), sample(1.0, 4.0), sample(3.0, 5.0), sample(3.5, 6.0), sample(0.0, 1.0, "full")]
    monkeypatch.setattr(measure, "load", lambda server, drive, **options: seen if not options else None)
    server: Any = Server()
    found = measure.closed(server, 8, 5.0)
    assert found == {"per_s": 0.6, "p50_s": 2.0, "p99_s": 3.0, "cpu_s": 0.5, "errors": 1.0}
    monkeypatch.setattr(measure, "load", lambda *_: seen[-1:])
    nothing = measure.closed(server, 8, 5.0)
    assert (nothing["per_s"], nothing["cpu_s"], nothing["errors"]) == (0.0, 2.0, 1.0)
    assert math.isnan(nothing["p50_s"]) and math.isnan(nothing["p99_s"])


def test_figures_of_an_open_load_and_of_one_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    seen = [
        sample(2.9, 3.0), sample(3.0, 5.0), sample(3.0, 5.1), sample(4.0, 5.5), sample(4.0, 5.6),
        sample(4.0, 4.1, "full"),
    ]  # fmt: skip

    def load(server: Any, drive: Any, **options: float) -> list[Sample]:
        asked.append(options)
        return seen

    monkeypatch.setattr(measure, "load", load)
    server: Any = Server()
    found = measure.open_(server, 2.0, 10.0, 1)
    assert found == {"p50_s": pytest.approx(1.6), "p99_s": pytest.approx(2.1), "errors": 1.0}
    assert measure.overload(server, 2.0, 10.0, 1, 0.0) == {"goodput_per_s": 0.3}
    assert measure.overload(server, 2.0, 10.0, 1, 1.5) == {"goodput_per_s": 0.1}
    patience_s = {"patience_s": measure.PATIENCE_S}
    assert asked == [{}, {"deadline_s": 0.0, **patience_s}, {"deadline_s": 1.5, **patience_s}]
    rates = (measure.SHARE, measure.OVERLOAD, measure.PATIENCE_S, measure.DEADLINE_S, measure.SETTLE_S, measure.USERS)
    assert rates == (0.7, 2.0, 2.0, 1.5, 3.0, (1, 8, 32)), "as the tables say"


def test_each_server_is_started_in_its_form_and_asked_in_its_words(tmp_path: Path) -> None:
    ours, lit, bento, *_ = CONTENDERS
    assert [one.name for one in CONTENDERS] == ["fewstep", "LitServe", "BentoML", "Ray Serve", "plain FastAPI"]
    python = Path("/venv/bin/python")
    assert ours.command(python, Form(0, 0), 80, 1.5) == [str(python), "-m", "service.run"]
    assert lit.command(python, Form(4, 1), 80, 1.5) == [
        str(python), "-m", "benchmarks.serving.servers.lit", "--port", "80", "--workers", "4", "--threads", "1",
        "--deadline-s", "1.5",
    ]  # fmt: skip
    assert lit.forms(8) == [Form(8, 1), Form(1, 8)] and [str(Form(8, 1)), str(Form(0, 0))] == ["8 x 1", "defaults"]
    assert ours.body("p", 7, 0.0) == lit.body("p", 7, 1.5) == {"prompt": "p", "seed": 7}
    assert ours.body("p", 7, 1.5) == {"prompt": "p", "seed": 7, "timeout_s": 1.5}
    assert bento.body("p", 7, 1.5) == {"requests": [{"prompt": "p", "seed": 7}]}
    answer = {"data": [{"b64_json": "aGk="}]}
    assert ours.picture(answer) == bento.picture([answer]) == b"hi"
    assert ours.environment(python, 80, tmp_path)["PATH"].startswith("/venv/bin:")
    assert "FEWSTEP_PORT" not in lit.environment(python, 80, tmp_path)


def test_a_ratio_is_worse_by_a_share_of_what_it_was() -> None:
    large, small = check.Ratio("a", True, 0.1), check.Ratio("b", False, 0.1)
    assert large.worse(0.8, 1.0) == pytest.approx(0.25) and small.worse(1.25, 1.0) == pytest.approx(0.25)
    assert large.worse(1.25, 1.0) == pytest.approx(-0.2) and small.worse(0.8, 1.0) == pytest.approx(-0.2)
    assert [(ratio.larger_is_better, ratio.allowed) for ratio in check.RATIOS] == [
        (True, 0.15), (True, 0.15), (False, 0.25), (False, 0.15), (False, 0.15), (False, 0.25),
    ]  # fmt: skip
    now = {ratio.name: 1.5 for ratio in check.RATIOS}
    said, worse = check.compare(now, {check.RATIOS[0].name: 3.0})
    assert worse == [check.RATIOS[0].name], "what has no baseline is not worse"
    assert said.splitlines()[1].split()[-4:] == ["3.000", "1.500", "+100%", "15%"]
    assert said.splitlines()[2].split()[-2:] == ["-", "1.500"]


def test_the_exit_status_tells_whether_it_is_worse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    figures = {ratio.name: 1.0 for ratio in check.RATIOS}
    monkeypatch.setattr(
        check, "measure", lambda seconds, rounds: dict(figures) if (seconds, rounds) == (5.0, 4) else {}
    )
    for arguments, status in ((["--write"], 0), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["check", *arguments])
        assert check.main() == status
    figures[check.RATIOS[4].name] = 1.16
    assert check.main() == 1
    figures[check.RATIOS[4].name] = 1.14
    assert check.main() == 0


def test_what_a_core_of_the_server_carries_is_the_inverse_of_a_jobs_time() -> None:
    assert queue_rate.Rate(10, 1, 5.0, 0.0005).of_one_core == pytest.approx(2000)


def test_growth_has_a_line_for_each_curve() -> None:
    curve = growth.Curve("n", "things", "us", (10, 100), (10,), 0.5, lambda point: {})
    lines = growth.table([curve], {"n": {10: {"value": 2.0}, 100: {"value": 20.0}}}).splitlines()
    assert lines[2] == "| things | 10 | 100 | 2.0 to 20.0 us | 1.00 (too much) | 0.5 |"
    steady = growth.table([curve], {"n": {10: {"value": 2.0}, 100: {"value": 2.0 * 10**0.5}}})
    assert "| 0.50 | 0.5 |" in steady and math.isnan(growth.power([1], [1.0]))
    most = {curve.name: curve.most for curve in growth.CURVES}
    assert most == {"waiting": 0.15, "keys": 0.3, "workers": 1.1, "apis": 1.1, "pixels": 2.15}


def test_a_simulated_alarm_is_raised_at_the_first_observation_beyond_the_threshold() -> None:
    """One bet that doubles at each low score and is lost at each high one."""
    low_is_two = drift_simulation.Table(np.array([0.0]), np.array([[2.0], [0.0]]))
    limit, steps, e = threshold(drift_simulation.SCORERS), 0, 0.0
    while e < limit:
        e, steps = min(CAP * limit, (e + 1) * 2), steps + 1

    def draw(first: int, count: int) -> Any:
        block = np.full((3, count), -1.0)
        block[1, : max(0, 5 - first)] = 1.0  # the second begins five later
        block[2] = 1.0  # the third never does
        return block

    assert list(drift_simulation.alarms([low_is_two] * 3, draw, 500)) == [steps, 5 + steps, 500]


def test_simulated_scores_have_mean_0_and_deviation_1_and_fall_when_they_are_told_to() -> None:
    gen = np.random.default_rng(0)
    for scores in drift_simulation.DISTRIBUTIONS.values():
        drawn = scores(gen, 200_000)
        assert drawn.mean() == pytest.approx(0.0, abs=0.01) and drawn.std() == pytest.approx(1.0, abs=0.01)
    assert drift_simulation.skewed(gen, 10_000).max() <= 1.0
    still, fallen = (drift_simulation.drawer(drift_simulation.normal, 2, 4, shift, 6) for shift in (0.0, 0.5))
    assert np.allclose(still(0, 10) - fallen(0, 10), [[0.0] * 6 + [0.5] * 4] * 2)
    assert np.allclose(still(10, 3) - fallen(10, 3), 0.5)
