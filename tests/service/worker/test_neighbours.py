"""Workers of one machine that share its cores: each knows whether another one draws, and takes its share then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from service.worker.neighbours import Neighbours
from service.worker.worker import Worker
from student.runtimes.runtime import CpuSharing
from tests.service.support import PATIENCE_S, REPOSITORY, Queue, eventually
from tests.service.worker.test_worker import Bench

DRAWS = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from service.worker.neighbours import Neighbours\n"
    "with Neighbours(Path(sys.argv[1])).drawing() as crowded:\n"
    "    print(crowded, flush=True)\n"
    "    time.sleep(600)\n"
)


def crowded(neighbours: Neighbours) -> bool:
    with neighbours.drawing() as found:
        return found


def test_whoever_draws_beside_others_knows(tmp_path: Path) -> None:
    ann, bob, eve = (Neighbours(tmp_path) for _ in range(3))
    with ann.drawing() as first, bob.drawing() as second, eve.drawing() as third:
        assert (first, second, third) == (False, True, True)
    assert not crowded(ann)
    with bob.drawing():
        assert crowded(eve) and crowded(eve)
    assert not crowded(eve)


def test_a_worker_that_is_killed_while_it_draws_is_no_neighbour(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", DRAWS, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"False\n"
        assert crowded(Neighbours(tmp_path))
        os.kill(child.pid, signal.SIGKILL)
        child.wait(PATIENCE_S)
        eventually(lambda: not crowded(Neighbours(tmp_path)), "the lock has ended with its process")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]


def test_a_runtime_knows_of_busy_neighbours_at_each_call(queue: Queue, tmp_path: Path) -> None:
    bench = Bench(queue, tmp_path / "results")
    cpu_sharing, seen = CpuSharing(), []
    bench.runtime.cpu_sharing = cpu_sharing  # type: ignore[attr-defined]
    bench.runtime.during = lambda: seen.append(cpu_sharing.crowded)
    other = Neighbours(tmp_path)
    worker = Worker(
        bench.runtime, bench.consumer, bench.heartbeat, bench.store, bench.stopping, neighbours=Neighbours(tmp_path)
    )
    with bench.heartbeat:
        for neighbour_busy in (False, True, False):
            queue.add()
            if neighbour_busy:
                with other.drawing():
                    worker.step()
            else:
                worker.step()
    assert seen == [False, True, False]
    assert not crowded(other), "nothing is locked between two calls"
