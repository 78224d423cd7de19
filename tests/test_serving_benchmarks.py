"""The benchmarks of serving: what is made of their figures, and that a peer's server gives the engine's own bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from benchmarks import batch_policies, check, growth
from benchmarks.serving import report
from benchmarks.serving.__main__ import State, engine_forms
from benchmarks.serving.contenders import CONTENDERS, Contender, Form, _engine_pins
from benchmarks.serving.engine import Engine
from benchmarks.serving.measure import Figures
from benchmarks.serving.servers import plain_fastapi


def points(scale: float, p99_s: float = 0.2) -> Mapping[str, Figures]:
    """One round of a server."""
    closed = {
        f"closed {users}": {"per_s": scale * users, "p50_s": 0.1 / scale, "p99_s": p99_s, "cpu_s": 0.01 / scale}
        for users in (1, 8, 32)
    }
    overload = {name: {"goodput_per_s": 16.0 * scale} for name in ("overload", "overload, deadline")}
    return {**closed, **overload, "open": {"p50_s": 0.1, "p99_s": p99_s}, "start": {"first_s": 1.5, "rss_mib": 99.0}}


FOUND = {
    "fewstep": [points(2.0), points(3.0), points(9.0)],
    "LitServe": [points(2.0, 0.1), points(2.0, 0.1)],
    "plain FastAPI": [points(1.0)],
}


def test_a_table_has_medians_and_their_spread() -> None:
    text = report.table(FOUND, {"fewstep": "defaults", "LitServe": "2 x 1", "plain FastAPI": "1 x 2"})
    row = next(line for line in text.splitlines() if line.startswith("| fewstep"))
    assert "| defaults | 3.0 (2.0-9.0), 33 | 24.0 (16.0-72.0), 33 | 96.0 (64.0-288.0), 33 |" in row
    assert row.endswith("| 0.50, 0.50 | 99 | 1.5 |")
    alone = next(line for line in text.splitlines() if line.startswith("| plain FastAPI"))
    assert "| 1 x 2 | 1.0, 100 | 8.0, 100 | 32.0, 100 |" in alone


def test_ratios_are_to_the_best_peer_of_each_figure() -> None:
    text = report.ratios(FOUND, [120.0, 192.0, 400.0])
    assert "| throughput at 8 users | LitServe | 1.50 |" in text
    assert "| throughput at 32 users | the engine alone, in its best form | 0.50 |" in text
    assert "| p50 of one user | plain FastAPI | 0.33 |" in text
    assert "| p99 of open arrivals at 70 % of each one's saturation | LitServe | 2.00 |" in text
    assert "| CPU of an answer at 32 users | LitServe | 0.67 |" in text


def test_a_document_is_written_between_its_marks_as_often_as_one_likes(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# Title\n\nBefore.\n")
    report.write_between(file, "one")
    file.write_text(file.read_text() + "\nAfter.\n")
    report.write_between(file, "two")
    report.write_between(file, "two")
    text = file.read_text()
    assert text.count("two") == 1 and "one" not in text
    assert text.index("Before.") < text.index("two") < text.index("After.")


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    report.plot(FOUND, [120.0], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving.__main__.KEPT", tmp_path / "out" / "serving.json")
    state = State.read("a")
    calls: list[int] = []

    def measured() -> float:
        calls.append(1)
        return 7.0

    assert [state.once(state.bare, "0", measured) for _ in range(2)] == [7.0, 7.0] and len(calls) == 1
    assert State.read("a").bare == {"0": 7.0} and State.read("b").bare == {}


def test_the_engine_is_tried_with_all_cores_in_every_form() -> None:
    forms = {form for form, _ in engine_forms(4)}
    assert forms == {Form(1, 4), Form(2, 2), Form(4, 1)}


def test_every_server_has_the_engine_in_the_same_versions(tmp_path: Path) -> None:
    pins = _engine_pins()
    assert {pin.split("==")[0] for pin in pins} == {"numpy", "onnxruntime", "pillow", "tokenizers"}
    ours = CONTENDERS[0]
    assert ours.forms(2) == [Form(0, 0)] and isinstance(ours, Contender)
    reported = ours.environment(tmp_path / "bin" / "python", 1234, tmp_path)
    assert reported["FEWSTEP_PORT"] == "1234" and "FEWSTEP_WORKERS" not in reported  # its defaults


def test_a_peers_answer_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plain_fastapi.THREADS, "1")
    peer = next(one for one in CONTENDERS if one.name == "plain FastAPI")
    with TestClient(plain_fastapi.app) as client:
        answer = client.post("/generate", json=peer.body("a red heart", 7, 0.0)).json()
        engine: Engine = plain_fastapi.app.state.engine
    (expected,) = engine.answer(["a red heart"], [7])
    assert answer == expected
    assert hashlib.sha256(peer.picture(answer)).hexdigest() == expected["data"][0]["sha256"]


@pytest.mark.parametrize(
    ("now", "worse"), [(0.9, False), (0.88, False), (0.8, True), (2.0, False), (float("nan"), True)]
)
def test_a_ratio_that_should_be_large_may_fall_by_so_much(now: float, worse: bool) -> None:
    name = check.RATIOS[0].name
    before = {ratio.name: 1.0 for ratio in check.RATIOS}
    _, found = check.compare({**before, name: now}, before)
    assert found == ([name] if worse else [])


def test_a_ratio_that_should_be_small_may_rise_by_so_much() -> None:
    name = check.RATIOS[3].name
    before = {ratio.name: 1.0 for ratio in check.RATIOS}
    assert check.compare({**before, name: 1.2}, before)[1] == [name]
    assert check.compare({**before, name: 1.1}, before)[1] == check.compare({**before, name: 0.1}, before)[1] == []


def test_growth_is_the_power_of_the_law() -> None:
    assert growth.power([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert growth.power([1, 2, 4], [5.0, 20.0, 80.0]) == pytest.approx(2.0)
    assert growth.power([1, 10, 100], [4.0, 4.0, 4.0]) == pytest.approx(0.0)


def test_growth_that_is_too_much_is_marked() -> None:
    curve = growth.CURVES[0]
    found = {curve.name: {10: {"value": 1.0}, 100: {"value": 10.0}}}
    assert "1.00 (too much)" in growth.table([curve], found)
    assert "(too much)" not in growth.table([curve], {curve.name: {10: {"value": 1.0}, 100: {"value": 1.1}}})


def test_the_policies_of_batches_are_compared_at_the_same_rates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    def measure(batch: int, seconds: float, seed: int, most: float | None) -> dict[str, Figures]:
        asked.append((batch, seconds, seed, most))
        per_s = {8: 100.0, 0: 90.0, 1: 80.0}[batch] + 10 * seed
        points = {f"{share:.0%}": {"p50_s": per_s / 1e4, "p99_s": per_s / 1e3} for share in batch_policies.SHARES}
        return {**{f"{users} users": {"per_s": per_s} for users in batch_policies.USERS}, **points}

    monkeypatch.setattr(batch_policies, "measure", measure)
    monkeypatch.setattr(batch_policies, "DOCUMENT", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"a {batch_policies.BEGIN} old {batch_policies.END} b")
    batch_policies.main(["--seconds", "2", "--rounds", "3", "--write"])
    rates = [None, 100.0, 100.0, None, 110.0, 110.0, None, 120.0, 120.0]
    assert asked == [(batch, 2.0, k, rates[3 * k + i]) for k in range(3) for i, batch in enumerate((8, 0, 1))]
    page = (tmp_path / "page.md").read_text()
    assert "| the rule | 100 (90-110) | 100 (90-110) | 10 (9-11), 100 (90-110) |" in page and "old" not in page
    assert page.strip().split(batch_policies.BEGIN)[1].split(batch_policies.END)[0].strip() in capsys.readouterr().out
    [ours] = [one for one in CONTENDERS if one.name == "fewstep"]
    server = batch_policies.Batched(ours.name, ours.module, body=ours.body, batch=1)
    assert server.environment(Path("python"), 1, tmp_path)["FEWSTEP_BATCH"] == "1"
