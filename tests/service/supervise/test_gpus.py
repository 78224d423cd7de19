"""FEWSTEP_WORKERS on a machine with GPUs: one worker on each, where it stays. The listing stands in for real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.observe.accelerators import VISIBLE, Accelerators, visible_gpus
from service.settings import Settings
from service.supervise.supervisor import workers_of
from service.supervise.workers_on_cpu import workers_on_cpu
from student.runtimes.manifest import OPENED_TWICE
from tests.service.support import call, check_answer, eventually, post, running_service

UUIDS = ("GPU-aaaa", "GPU-bbbb", "GPU-cccc")


class NoDriver(Exception):
    pass


def stand_in(uuids: tuple[str, ...] = UUIDS, driver: bool = True) -> SimpleNamespace:
    """NVIDIA's management library on a machine with these GPUs."""

    def init() -> None:
        if not driver:
            raise NoDriver

    return SimpleNamespace(
        NVMLError=NoDriver,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(uuids),
        nvmlDeviceGetHandleByIndex=lambda index: uuids[index],
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1, total=2),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=50),
        nvmlDeviceGetPowerUsage=lambda handle: 300_000,
        nvmlDeviceGetTemperature=lambda handle, _: 60,
    )


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, UUIDS),
        ("", ()),
        ("-1", ()),
        ("1", ("1",)),
        ("2, 0", ("2", "0")),
        ("0,-1,2", ("0",)),
        ("GPU-bbbb", ("GPU-bbbb",)),
        ("MIG-1234,MIG-5678", ("MIG-1234", "MIG-5678")),
    ],
)
def test_the_gpus_are_those_of_the_machine_or_those_that_were_chosen(
    chosen: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.delenv(VISIBLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(VISIBLE, chosen)
    assert visible_gpus() == expected


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(driver=False))
    assert visible_gpus() == () and Accelerators().measure() == {}


def test_a_worker_tells_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.delenv(VISIBLE, raising=False)
    assert list(Accelerators().measure()) == list(UUIDS)
    monkeypatch.setenv(VISIBLE, "GPU-bbbb")
    assert list(Accelerators().measure()) == ["GPU-bbbb"]


def test_a_gpu_that_stops_answering_is_told_of_no_more_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in()
    lost = set[str]()

    def temperature(handle: str, _: int) -> int:
        if handle in lost:
            raise NoDriver
        return 60

    library.nvmlDeviceGetTemperature = temperature
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv(VISIBLE, raising=False)
    found = Accelerators()
    for gone in ("GPU-bbbb", "GPU-aaaa"):
        lost.add(gone)
        assert set(found.measure()) == {*UUIDS} - lost
    lost.clear()
    assert list(found.measure()) == list(UUIDS), "it may come back"


@pytest.mark.parametrize(
    ("wanted", "gpus", "on_cpu", "expected"),
    [
        ("auto", (), 1, [""]),
        ("auto", (), 3, ["", "", ""]),
        ("auto", UUIDS, 4, list(UUIDS)),
        (1, UUIDS, 4, ["GPU-aaaa"]),
        (2, (), 4, ["", ""]),
        (4, UUIDS, 1, ["GPU-aaaa", "GPU-bbbb", "GPU-cccc", "GPU-aaaa"]),
    ],
)
def test_workers_take_the_gpus_in_turn(wanted: object, gpus: tuple[str, ...], on_cpu: int, expected: list[str]) -> None:
    assert [child.gpu for child in workers_of(wanted, gpus, on_cpu)] == expected  # type: ignore[arg-type]


def test_a_small_compiled_student_has_a_worker_for_each_of_a_few_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def workers(cores: int, **settings: object) -> int:
        monkeypatch.setattr(Settings, "cores", cores)
        return workers_on_cpu(Settings(**settings))  # type: ignore[arg-type]

    assert [workers(cores) for cores in (1, 2, 64)] == [1, 2, 4], "the student that ships"
    assert workers(8, runtime="fake") == workers(8, runtime="torch") == workers(8, models=tmp_path) == 1
    folder = tmp_path / "large" / "runtimes" / "onnx-staged-fp32"
    folder.mkdir(parents=True)
    assert workers(8, model=tmp_path / "large") == 1, "nothing is compiled"
    with (folder / "step.onnx").open("wb") as file:
        file.truncate(OPENED_TWICE + 1)
    assert workers(8, model=tmp_path / "large") == 1, "each worker would hold it"


def environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's environment is read from /proc")
def test_auto_starts_a_worker_on_each_gpu_which_comes_back_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, "GPU-aaaa,GPU-bbbb")
    with running_service(tmp_path / "data", WORKERS="auto", THREADS="1") as live:

        def workers() -> dict[str, int]:
            running = live.run_file()["processes"]
            pids = [process["pid"] for process in running if process["role"] == "worker"]
            found = {environment(pid).get(VISIBLE, ""): pid for pid in pids}
            return found if set(found) == {"GPU-aaaa", "GPU-bbbb"} else {}

        first = eventually(workers, "two workers")
        assert {environment(pid)["FEWSTEP_WORKERS"] for pid in first.values()} == {"2"}
        eventually(lambda: call("GET", f"{live.url}/readyz").json()["workers"] == 2, "both are ready")
        killed = live.kill("worker")
        again = eventually(lambda: (found := workers()) and killed not in found.values() and found, "it is back")
        assert len(set(again.values()) & set(first.values())) == 1
        check_answer(post(live.url, prompt="p", seed=1).json(), "p", [1])
