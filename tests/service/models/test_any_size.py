"""A service whose student is run by torch draws every size of its model's range, and says so of the others."""

from __future__ import annotations

import base64
from pathlib import Path

from service.worker.pictures import encode
from service.worker.provenance import Provenance
from student.runtimes.load import load
from tests.service.support import call, post, running_service

MADE_BY = Provenance("tiny", "1")


def test_a_size_of_the_range_is_drawn_and_another_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    runtime = load(bundle, "torch", 1)
    with running_service(tmp_path / "data", MODEL=str(bundle), RUNTIME="torch", THREADS="1") as live:
        answer = post(live.url, prompt="ring", seed=7, size="96x48").json()
        [image] = answer["data"]
        drawn = runtime.draw(["ring"], [7], 4, size=(48, 96))  # type: ignore[call-arg]
        assert (image["width"], image["height"]) == (96, 48)
        assert base64.b64decode(image["b64_json"]) == encode(drawn[0], "png", made_by=MADE_BY)
        refused = call("POST", f"{live.url}/generate", json={"prompt": "ring", "width": 100})
        said = "width is 100x64: tiny generates sides that are multiples of 16 pixels."
        assert refused.status_code == 422 and refused.json()["error"]["message"] == said
        previews = call("POST", f"{live.url}/generate", json={"prompt": "a", "stream": True, "partial_images": 1})
        assert previews.status_code == 200 and "image_generation.partial_image" in previews.text
