"""``make soak``: steady mixed load with cancels, disconnects and kills; is anything left behind? Plotted in out/soak/.

Of every process: resident memory and open files; of the queue's server: memory and number of keys. What is reported is
the slope over the second half, when records have begun to run out as fast as they come.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from tests.chaos.clients import Clients
from tests.chaos.fleet import Fleet
from tests.service.support import call, open_post

OUT = Path(__file__).resolve().parents[2] / "out" / "soak"
SAMPLE_EVERY_S = 2.0
RESULT_TTL_S = 20
BURST = 8
MIB = 2**20
Samples = dict[str, list[tuple[float, float]]]


def sample(fleet: Fleet, samples: Samples, now_s: float) -> None:
    """One look at everything."""
    roles = {"api": fleet.apis[1], "worker": fleet.workers[1]}  # the ones that are never killed
    for role, member in roles.items():
        pid = member.process.pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        samples.setdefault(f"{role} memory (MiB)", []).append((now_s, resident_kib / 1024))
        samples.setdefault(f"{role} open files", []).append((now_s, len(list(Path(f"/proc/{pid}/fd").iterdir()))))
    client = fleet.redis
    used = float(client.info("memory")["used_memory"])
    samples.setdefault("server memory (MiB)", []).append((now_s, used / MIB))
    samples.setdefault("server keys", []).append((now_s, float(client.dbsize())))
    client.close()


def trouble(fleet: Fleet, chosen: random.Random) -> None:
    """One of the things that happen."""
    what = chosen.choice(("kill", "leave", "cancel", "cancel"))
    if what == "kill":
        fleet.workers[0].send(signal.SIGKILL)
    elif what == "leave":
        with open_post(fleet.apis[1].url, prompt="leaves", seed=1):
            time.sleep(0.02)
    else:
        headers, body = {"Prefer": "respond-async"}, {"prompt": "fake:step=0.05 cancelled", "seed": 1}
        accepted = call("POST", f"{fleet.apis[1].url}/generate", headers=headers, json=body)
        call("POST", f"{fleet.apis[1].url}/jobs/{accepted.json()['id']}/cancel")


def slope_per_hour(points: list[tuple[float, float]]) -> float:
    """The change in an hour, by least squares over the second half."""
    times, values = np.array(points[len(points) // 2 :]).T
    return float(np.polyfit(times, values, 1)[0] * 3600)


def run(fleet: Fleet, minutes: float, seed: int) -> tuple[Samples, Clients]:
    chosen, samples, end = random.Random(seed), Samples(), threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while not end.wait(SAMPLE_EVERY_S):
            sample(fleet, samples, time.monotonic() - began)

    watching = threading.Thread(target=watch)
    watching.start()
    with Clients([api.url for api in fleet.apis], seed) as clients:
        while time.monotonic() - began < minutes * 60:
            clients.send(BURST, "fake:sleep=0.02")
            trouble(fleet, chosen)
            clients.settle()
    end.set()
    watching.join()
    return samples, clients


def plot(samples: Samples, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(10, 8), sharex=True)
    for axis, (name, points) in zip(axes.flat, samples.items(), strict=True):
        times, values = np.array(points).T
        axis.plot(times / 60, values)
        axis.set_title(f"{name}, {slope_per_hour(points):+.1f} an hour", fontsize=9)
        axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the service under steady load and look at what stays behind.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    fleet = Fleet(folder / "fleet", RESULT_TTL_S=str(RESULT_TTL_S))
    try:
        samples, clients = run(fleet, chosen.minutes, chosen.seed)
    finally:
        fleet.close()
        shutil.rmtree(folder)
    with (OUT / "soak.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series", "seconds", "value"])
        writer.writerows(
            (name, f"{at:.1f}", f"{value:.2f}") for name, points in samples.items() for at, value in points
        )
    plot(samples, OUT / "soak.png")
    account = clients.account
    for name, points in samples.items():
        print(f"{name}: {points[-1][1]:.1f} at the end, {slope_per_hour(points):+.1f} an hour")
    print(
        f"{account.sent} sent, {account.answered} answered, {account.lost} lost, {account.wrong} wrong; see {OUT.name}/"
    )
    return 1 if account.lost or account.wrong or account.refused else 0


if __name__ == "__main__":
    sys.exit(main())
