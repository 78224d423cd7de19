"""The figures of rules and dashboard that nobody derives: from when an alert fires, for how long, and whom it wakes.

Prometheus' own test of the rules (``test_observability``) needs promtool; this needs nothing.
"""

from __future__ import annotations

import io
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.dashboard import panels, queries
from deploy.docker_test import who_drew
from service.http.overload import GUARDED
from service.observe.logs import configure_logging
from service.settings import Settings
from service.worker.execution import execute
from service.worker.worker import Worker
from student.runtimes.fake import FakeRuntime
from tests.deploy.test_observability import rules
from tests.service.support import a_job

BURN = "fewstep:errors:ratio_rate"
PROBE = 'max by (model, version) (fewstep_probe_workers{outcome="%s"}) > 0'
ALERTS = {
    "ErrorBudgetBurnsFast": ("1m", "page", f"{BURN}5m > 14.4 * 0.005 and {BURN}1h > 14.4 * 0.005"),
    "ErrorBudgetBurns": ("5m", "ticket", f"{BURN}30m > 6 * 0.005 and {BURN}6h > 6 * 0.005"),
    "Slow": ("5m", "ticket", "fewstep:job_duration_seconds:p99_5m > 5"),
    "OldestJob": ("1m", "page", "fewstep:queue_oldest_age_seconds:max > 30"),
    "DeadLetters": (None, "ticket", "max(increase(fewstep_jobs_dead_total[15m])) > 0"),
    "Redeliveries": (
        "10m",
        "ticket",
        "max(rate(fewstep_jobs_redelivered_total[10m])) > 0.1 * max(rate(fewstep_jobs_finished_total[10m])) > 0",
    ),
    "NoReadyWorker": ("1m", "page", "(fewstep:ready_workers:max or vector(0)) == 0 and fewstep:queue_depth:max > 0"),
    "QueueOutOfReach": ("30s", "page", "max(fewstep_queue_up) == 0"),
    "Down": ("30s", "page", '(sum(up{job="fewstep"}) or vector(0)) == 0'),
    "RedisMemory": ("5m", "ticket", "fewstep:redis_memory:ratio > 0.8"),
    "RedisCannotAppend": ("1m", "page", "min(fewstep_redis_append_ok) == 0"),
    "EngineChanged": (None, "page", PROBE % "pixels_changed"),
    "ScorersChanged": (None, "ticket", PROBE % "scores_changed"),
    "ProbeFails": (None, "ticket", PROBE % "failed"),
    "RewardDrift": (None, "ticket", "max by (model, version, steps, scorer, cause) (fewstep_drift_alarm) > 0"),
}
ASKED = 'fewstep_requests_total{method="POST",route=~"/generate|/v1/images/generations|/v1/videos"'


def test_every_request_that_asks_for_a_picture_or_a_video_counts_for_the_error_budget() -> None:
    asked = re.search('route=~"([^"]*)"', ASKED)
    assert asked and set(asked[1].split("|")) == {*GUARDED}


def failing(window: str) -> str:
    return f'(sum(rate({ASKED},code=~"5.."}}[{window}])) or vector(0)) / sum(rate({ASKED}}}[{window}]))'


RECORDED = {
    **{f"errors:ratio_rate{window}": failing(window) for window in ("5m", "30m", "1h", "6h")},
    "job_duration_seconds:p99_5m": (
        "histogram_quantile(0.99, sum by (le) (rate(fewstep_job_duration_seconds_bucket[5m])))"
    ),
    "queue_depth:max": "max(fewstep_queue_depth)",
    "queue_oldest_age_seconds:max": "max(fewstep_queue_oldest_age_seconds)",
    "ready_workers:max": "max(fewstep_ready_workers)",
    "redis_memory:ratio": "max(fewstep_redis_memory_used_bytes) / (max(fewstep_redis_memory_max_bytes) > 0)",
}


def written(rule: dict[str, Any]) -> str:
    return " ".join(rule["expr"].split())


def test_each_alert_fires_where_it_was_agreed() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    found = {rule["alert"]: (rule.get("for"), rule["labels"]["severity"], written(rule)) for rule in alerts}
    assert found == {f"Fewstep{name}": figures for name, figures in ALERTS.items()}


def test_each_recorded_name_is_what_it_says() -> None:
    found = {rule["record"]: written(rule) for rule in rules() if "record" in rule}
    assert found == {f"fewstep:{name}": expression for name, expression in RECORDED.items()}


@pytest.mark.parametrize(
    ("unit", "titles"),
    [
        ("reqps", {"Requests for pictures and videos"}),
        (
            "s",
            {
                "From acceptance to pictures",
                "Mean by stage",
                "One call of the runtime",
                "Age of the oldest waiting job",
            },
        ),
        ("bytes", {"Memory of the queue's server", "GPU memory"}),
        ("percentunit", {"Low scores", "Share of time in the runtime", "GPU busy"}),
    ],
)
def test_a_panel_has_the_unit_of_what_it_shows(unit: str, titles: set[str]) -> None:
    assert {panel.title for panel in panels() if panel.unit == unit} == titles


def test_lines_are_drawn_where_the_alerts_fire() -> None:
    """The budget of errors, the age of the oldest job, and an alarm of drift."""
    lines = {panel.title: panel.threshold for panel in panels() if panel.threshold is not None}
    assert lines == {"Errors and refusals": 0.005, "Age of the oldest waiting job": 30, "Drift": 1}


def test_a_quantile_is_drawn_under_its_own_name_and_rates_are_of_a_minute() -> None:
    named = []
    for query in queries():
        assert set(re.findall(r"\[([^\]]*)\]", query.expression)) <= {"1m"}, query
        named += [
            (query.legend.split()[0], float(share))
            for share in re.findall(r"histogram_quantile\(([\d.]+),", query.expression)
        ]
    medians = [("{{model}}", 0.5)] * 2  # of scores, and of what choosing has gained: their titles say what they are
    p50, p90, p99 = ("p50", 0.5), ("p90", 0.9), ("p99", 0.99)
    assert sorted(named) == sorted([p50, p90, p99, p50, p99, p90, *medians])


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_test_of_the_containers_finds_who_drew_in_the_workers_own_words(form: Any) -> None:
    """Compose puts the container's name before each line."""
    runtime, jobs = FakeRuntime(), [a_job(), a_job(prompt="fake:raise")]
    batch: Any = SimpleNamespace(token="7", shape=(), jobs=jobs)
    worker: Any = SimpleNamespace(device=SimpleNamespace(measured=lambda *_: None))
    root = logging.getLogger()
    before, root.handlers, level = root.handlers, [], root.level
    configure_logging(Settings(log_format=form), stream := io.StringIO())
    try:
        Worker._report(worker, batch, execute(runtime, jobs))
        Worker._report(worker, batch, execute(runtime, jobs[1:]))
        logging.getLogger("service").info("student loaded")
    finally:
        root.handlers = before
        root.setLevel(level)
    words = ("generated 1 of 2", "generated 0 of 2", "loaded")
    lines = [line for line in stream.getvalue().splitlines() if any(word in line for word in words)]
    assert len(lines) == 3
    logs = "\n".join(f"worker-{k}  | {line}" for k, line in enumerate(lines, 1))
    assert who_drew(logs) == {"worker-1"}, "the second has drawn nothing, and the third has only loaded"
