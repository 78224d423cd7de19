"""Rules and dashboard ask only for what a live service shows, and Prometheus itself agrees with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.dashboard import DASHBOARD, FOLDER, STRING, names, panels, queries, without_data
from service.keys import KeyStore
from service.queue.consumer import Consumer
from tests.deploy.prometheus import running
from tests.service.support import Service, eventually, running_service

PROMETHEUS = FOLDER / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
SELECTOR = re.compile(r"\b(fewstep\w*)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
BUCKET_LABELS = {"le"}
CHOSEN = {"prompt": "a red heart", "best_of": 2, "min_reward": "p99"}


def rules() -> list[dict[str, Any]]:
    found = [yaml.safe_load(path.read_text("utf-8")) for path in RULES]
    return [rule for file in found for group in file["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [query.expression for query in queries()]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """The starter student, with keys: one to draw with and one of Prometheus."""
    folder = tmp_path_factory.mktemp("observed") / "data"
    store = KeyStore(folder)
    keys = {scope: store.create(scope, [scope])[1] for scope in ("generate", "metrics")}
    with running_service(folder, RUNTIME="auto") as live:
        for seed in range(3):
            answer = httpx.post(
                f"{live.url}/generate", json={**CHOSEN, "seed": seed}, timeout=60, trust_env=False,
                headers={"Authorization": f"Bearer {keys['generate']}"},
            )  # fmt: skip
            assert answer.status_code == 200
        yield live, keys


def tell_of_a_gpu(live: Service) -> None:
    """A worker on another machine gives a sign of life, as one does that sees a GPU."""
    report = {"busy": 0.9, "used_bytes": 4e9, "total_bytes": 8e9, "power_w": 250.0, "temperature_c": 60}
    info = {"runtime": "r", "host": "h", "max_batch": 8, "gpus": {"GPU-1": report}}
    with live.redis as client:
        Consumer(client, "shapes", "elsewhere", lease_s=30.0, max_attempts=3).beat(info, [])


def labels_of_samples(service: Service, token: str) -> dict[str, set[str]]:
    """The labels of each sample name that /metrics shows; of a family without a sample yet none is known."""

    def settled() -> str:
        answer = httpx.get(
            f"{service.url}/metrics", headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )
        assert answer.status_code == 200
        return answer.text if "fewstep_images_total{" in answer.text else ""

    tell_of_a_gpu(service)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(eventually(settled, "a picture is counted")):
        found.setdefault(f"{family.name}_total" if family.type == "counter" else family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_name_in_rules_and_dashboard_is_a_live_metric_or_a_recorded_one(
    service: tuple[Service, dict[str, str]],
) -> None:
    live, keys = service
    shown = labels_of_samples(live, keys["metrics"])
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for expression in expressions() for name in names(expression)}
    assert used - recorded - set(shown) == set()
    assert len(used & set(shown)) > 15


def test_every_label_that_is_chosen_or_grouped_by_is_one_of_the_metric(service: tuple[Service, dict[str, str]]) -> None:
    live, keys = service
    shown = labels_of_samples(live, keys["metrics"])
    for expression in expressions():
        bare = STRING.sub('""', expression)
        for name, chosen in SELECTOR.findall(bare):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", chosen or ""))
            assert labels <= (shown.get(name) or labels), f"{name} has no label of {sorted(labels)}: {expression}"
        grouped = {label.strip() for group in GROUPED.findall(bare) for label in group.split(",")}
        known = set().union(*(shown.get(name) or grouped for name in names(bare)))
        assert grouped <= known, f"{sorted(grouped - known)}: {expression}"


def test_these_tests_see_a_metric_that_does_not_exist() -> None:
    assert names('rate(fewstep_nothing_total{a="fewstep_text"}[5m]) / fewstep:a:b') == {
        "fewstep_nothing_total", "fewstep:a:b",
    }  # fmt: skip
    assert without_data(queries()[:1], lambda _: [{"value": [0, "NaN"]}]) != []
    assert without_data(queries()[:1], lambda _: []) != []
    assert without_data(queries()[:1], lambda _: [{"value": [0, "0"]}]) == []


def test_where_there_is_no_gpu_only_the_queries_about_them_are_left_out() -> None:
    apart = [query for query in queries() if query not in queries(gpus=False)]
    assert {query.panel for query in apart} == {"GPU busy", "GPU memory", "GPU power and temperature"}
    assert all(names(query.expression) and "fewstep_gpu_" in query.expression for query in apart)


def test_every_recorded_name_is_used_and_every_alert_says_what_to_do() -> None:
    used = {name for expression in expressions() for name in names(expression)}
    for rule in rules():
        if "record" in rule:
            assert rule["record"] in used, rule["record"]
        else:
            assert rule["labels"]["severity"] in ("page", "ticket") and set(rule["annotations"]) == {
                "summary",
                "action",
            }


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml")],
        ["check", "rules", *map(str, RULES)],
        ["test", "rules", str(PROMETHEUS / "rules_test.yml")],
    ],
    ids=["config", "rules", "answers"],
)
def test_promtool_agrees(arguments: list[str]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")
def test_every_query_of_the_dashboard_has_an_answer(service: tuple[Service, dict[str, str]], tmp_path: Path) -> None:
    """With the token from a file, as in the containers; the figures are those of a service that draws."""
    live, keys = service
    with running(tmp_path, live.url.removeprefix("http://"), keys["metrics"]) as prometheus:
        headers = {"Authorization": f"Bearer {keys['generate']}"}

        def draw_and_ask() -> bool:
            body = {**CHOSEN, "seed": 1}
            assert httpx.post(
                f"{live.url}/generate", json=body, headers=headers, timeout=60, trust_env=False
            ).is_success
            tell_of_a_gpu(live)
            return not without_data(queries(), prometheus.ask)

        try:
            eventually(draw_and_ask, "every query has an answer", patience_s=60)
        except AssertionError:
            pytest.fail(f"without data: {without_data(queries(), prometheus.ask)}")
        assert {alert["labels"]["alertname"] for alert in prometheus.ask("ALERTS")} <= {"FewstepRewardDrift"}


def test_the_dashboard_is_one_that_grafana_can_provision() -> None:
    """Its own unique ids, known panels, the data source that is provisioned, and nothing that overlaps."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    folder = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "fewstep.yml").read_text("utf-8"))["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] == "/etc/grafana/dashboards"
    assert dashboard["uid"] == "fewstep" and dashboard["schemaVersion"] >= 36
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) > 15
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["type"] in ("row", "timeseries")
        at = panel["gridPos"]
        covered = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not covered & cells and max(x for x, _ in covered) < 24
        cells |= covered
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == source["uid"]
    refs = [[query.legend for query in panel.queries] for panel in panels()]
    assert all(len(legends) == len(set(legends)) for legends in refs)
