"""How many images should share a call: the service's rule beside fixed sizes and waits, in the simulator."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.fleet_simulation import BY_RULE, FULL, Batches, Times, predict

LOADS = (0.5, 0.7, 0.9)  # of what all workers can draw at best
COUNT = 8000


def forms(times: Times) -> dict[str, Batches]:
    """What is compared: the rule, what waits, one image, and what waits after half a call's wait for more."""
    wait_s = times.calls.mean(1) / 2
    return {
        "the rule": BY_RULE,
        f"what waits, up to {times.max_batch}": Batches(times.max_batch),
        "one image": Batches(1),
        f"up to {times.max_batch}, after {wait_s * 1000:.0f} ms": Batches(times.max_batch, wait_s),
    }


def batches(times: Times, workers: int) -> str:
    """A table: mean and p99 in calls of one image, so that they compare, and the images of a call."""
    one_s = times.claim_s + times.calls.mean(1) + times.settle_s
    lines = [
        "| share of the capacity | " + " | ".join(forms(times)) + " |",
        "|--:" * (1 + len(forms(times))) + "|",
    ]
    for load in LOADS:
        rate, cells = load * times.capacity * workers, []
        for form in forms(times).values():
            if form.most == 1 and rate * one_s > FULL * workers:
                cells.append("cannot keep up")
                continue
            found = predict(times, rate, workers, COUNT, batches=form)
            cells.append(f"{found.mean_s / one_s:.2f}, {found.p99_s / one_s:.1f} ({found.batch:.1f})")
        lines.append(f"| {load:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steady(fixed_s: float, image_s: float, claim_s: float = 0.0, most: int = 8) -> Times:
    """Calls that take ``fixed_s`` and then ``image_s`` for each image, and ``claim_s`` between two of them."""
    calls = {images: fixed_s + image_s * images for images in range(1, most + 1)}
    return replace(Times.steady(calls), claim_s=claim_s)
