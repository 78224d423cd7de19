"""The shipped student in a whole service: other prompts are told from another engine, each by its own alarm."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.probe import update_probe
from student.probe import Outcome
from student.runtimes.load import load
from tests.service.observe.test_metrics import read
from tests.service.students import change_engine, change_one_weight, copy_starter
from tests.service.support import Service, call, eventually, post, running_service
from training.shapes.prompts import reference_prompts

NAMED = {"model": "shapes", "version": "2"}
OTHERS = ("elephant", "street at night", "portrait of an old man", "mountain lake", "bowl of fruit")
LIGHTS = ("dawn", "noon", "dusk", "candlelight")


def proven(folder: Path) -> Path:
    """A copy of the student whose probe knows this machine."""
    bundle = copy_starter(folder, "2")
    update_probe(bundle, load(bundle, "onnx", 1), ["x"])
    return bundle


def serving(bundle: Path, folder: Path) -> Any:
    return running_service(folder / "data", RUNTIME="onnx", MODEL=str(bundle), THREADS="1")


def ask(service: Service, prompts: Iterable[str]) -> None:
    def one(numbered: tuple[int, str]) -> int:
        return post(service.url, prompt=numbered[1], seed=numbered[0]).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, enumerate(prompts))) == {200}


def probed(service: Service) -> dict[str, int]:
    (version,) = call("GET", f"{service.url}/v1/models/shapes").json()["versions"]
    outcomes: dict[str, int] = version["probe"]["outcomes"]
    return outcomes if "waiting" not in outcomes else {}


def drifts(service: Service) -> set[str]:
    """The causes of the drifts that there are."""
    return {row["cause"] for row in call("GET", f"{service.url}/admin/drift").json()["data"] if row["cause"]}


def alarms(service: Service) -> tuple[float, set[str]]:
    """As Prometheus sees them: workers whose engine has changed, and the causes of drifts."""
    samples = read(call("GET", f"{service.url}/metrics").text)
    raised = [dict(labels) for (name, labels), number in samples.items() if name == "fewstep_drift_alarm" and number]
    changed = ("fewstep_probe_workers", frozenset({**NAMED, "outcome": "pixels_changed"}.items()))
    return samples.get(changed, 0.0), {labels["cause"] for labels in raised}


def test_other_prompts_raise_the_prompts_alarm_and_not_the_engines(tmp_path: Path) -> None:
    usual = reference_prompts(150)
    other = [f"{what} at {light} {k}" for k in range(6) for what in OTHERS for light in LIGHTS]
    with serving(proven(tmp_path), tmp_path) as service:
        assert eventually(lambda: probed(service), "the probe is drawn") == {Outcome.SAME: 1}
        ask(service, usual)
        assert drifts(service) == set() and alarms(service) == (0, set())
        ask(service, other)
        assert drifts(service) == {"prompts"} and alarms(service) == (0, {"prompts"})


def test_a_changed_weight_raises_the_engines_alarm_and_not_the_prompts(tmp_path: Path) -> None:
    bundle = proven(tmp_path)
    change_engine(bundle, change_one_weight)
    with serving(bundle, tmp_path) as service:
        assert eventually(lambda: probed(service), "the probe is drawn") == {Outcome.PIXELS_CHANGED: 1}
        ask(service, reference_prompts(150))
        assert drifts(service) == set() and alarms(service) == (1, set())
