"""The newer families, adopted as diffusers saves them and served: what is sent is what diffusers draws."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export import run as export
from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce
from student.runtimes.onnx import STAGED_FP32
from tests.export.adopting import run as adopt
from tests.service.support import Service, pixels, post, running_service, wait_for_models
from tests.service.video_files import as_bytes, decode_webp
from tests.student.families import tiny

NAMES = ("flux2", "qwen_image", "wan_5b", "wan_14b", "z_image")
PROMPT, SEED = "a red heart", 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("families")
    for name in NAMES:
        tiny.MAKERS[name]().save_pretrained(work / name / "published")
        length = ("--frames", "5") if name.startswith("wan") else ()
        code, said = adopt(
            work / name / "published", "--steps", "2", "--size", "32x64", *length, "--out", work / "out" / name
        )
        assert code == 0, said
        (work / "models" / name).mkdir(parents=True)
        shutil.move(work / "out" / name, work / "models" / name / "1")
    return work / "models"


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("served") / "data"
    with running_service(data_dir, MODELS=str(models), THREADS="1", RUNTIME="torch") as live:
        wait_for_models(live, models)
        yield live


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_is_what_diffusers_draws(service: Service, models: Path, name: str) -> None:
    check_sent(service, models / name / "1", name, "torch")


def test_both_experts_of_wan_14b_are_served_compiled(models: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    bundle = Path(shutil.copytree(models / "wan_14b", tmp_path / "models" / "wan_14b")) / "1"
    export.run(student=bundle, to="onnx")
    assert (bundle / "runtimes" / STAGED_FP32 / "step_2.onnx").is_file()
    with running_service(tmp_path / "data", MODELS=str(tmp_path / "models"), THREADS="1", RUNTIME="onnx") as live:
        check_sent(live, bundle, "wan_14b", STAGED_FP32)


def check_sent(service: Service, bundle: Path, name: str, runtime: str) -> None:
    form = {"output_format": "webp", "output_compression": 100} if name.startswith("wan") else {"output_format": "png"}
    response = post(service.url, model=name, prompt=PROMPT, seed=SEED, **form)
    assert response.status_code == 200, response.text
    answer = response.json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    drawn = reproduce(open_pipeline(bundle), read_student(bundle), [PROMPT], [SEED], 2)
    if name.startswith("wan"):
        sent, wanted = decode_webp(data).frames_FHWC, as_bytes(drawn[0])
    else:
        sent, wanted = pixels(data)[None], as_bytes(drawn)
    assert answer["runtime"] == runtime and sent.shape == wanted.shape and wanted.std() > 5
    off = np.abs(sent.astype(int) - wanted)
    assert off.max() <= 1 and (off > 0).mean() < 1e-2  # a byte may lie within float32's error of the middle of two
