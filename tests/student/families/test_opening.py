"""Why a pipeline cannot be opened, in one sentence: files that are broken, and hub ids that are not to be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import pytest
import torch

from student.bundle import BundleError
from student.families.find import FAMILIES, open_family
from student.pipeline import read_index
from student.saved import variant_of
from tests.student.families import tiny


class Hub(BaseHTTPRequestHandler):
    """The hub's answer to somebody who is not logged in: every model of ``owner`` is gated, others do not exist."""

    def do_HEAD(self) -> None:
        gated = self.path.startswith("/owner/")
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to model is restricted. You must be authenticated.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_that_wants_a_licence_or_a_login_says_so(hub: str, tmp_path: Path) -> None:
    code = """
import sys
from student.bundle import BundleError
from student.pipeline import read_index
for model in sys.argv[1:]:
    try:
        read_index(model, local_files_only=False)
    except BundleError as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "owner/gated", "nobody/nothing"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "owner/gated cannot be opened: it is gated; accept its licence at https://huggingface.co/owner/gated "
        "and log in with `hf auth login` or HF_TOKEN",
        "nobody/nothing cannot be opened as a folder or as a hub id: none of that name exists, or it is gated or "
        "private; if it is, accept its licence at https://huggingface.co/nobody/nothing and log in with "
        "`hf auth login` or HF_TOKEN",
    ], done.stderr


def test_weights_that_are_missing_or_not_whole_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.flux().save_pretrained(tmp_path)
    capfd.readouterr()
    for part in ("text_encoder", "transformer"):  # read by transformers, and by diffusers
        [weights] = (tmp_path / part).glob("*.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        with pytest.raises(BundleError, match=f"^{tmp_path} cannot be opened: [^\n]+$"):
            open_family(tmp_path)
        weights.unlink()
        with pytest.raises(BundleError, match=f"^{tmp_path} cannot be opened: [^\n]* no file [^\n]+$"):
            open_family(tmp_path)
        weights.write_bytes(whole)
    assert open_family(tmp_path).name == "flux"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shard", ["10GB", "4KB"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_pipeline_of_a_variant_alone_is_opened(variant: str, shard: str, tmp_path: Path) -> None:
    pipe = tiny.flux()
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    assert variant_of(tmp_path, read_index(tmp_path)) == variant
    opened = open_family(tmp_path, local_files_only=True)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "4KB")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(opened.transformer.state_dict()[name], value), name


def test_plain_weights_are_read_where_they_are_there(tmp_path: Path) -> None:
    tiny.flux(seed=1).save_pretrained(tmp_path, variant="fp16")
    plain = tiny.flux()
    plain.save_pretrained(tmp_path)
    assert variant_of(tmp_path, read_index(tmp_path)) is None
    weight = plain.transformer.x_embedder.weight
    assert torch.equal(open_family(tmp_path, local_files_only=True).transformer.x_embedder.weight, weight)


def test_a_part_that_has_no_variant_is_read_beside_one_that_has_no_other(tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "vae/diffusion_pytorch_model.safetensors"
    )
    assert open_family(tmp_path, local_files_only=True).name == "flux"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_a_git_lfs_pointer_is_called_one_wherever_it_lies(name: str, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(BundleError, match=f"^{tmp_path / name} is a Git LFS pointer, not the file itself: [^\n]+$"):
        open_family(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_byte_order_mark_is_called_one(name: str, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    with pytest.raises(BundleError, match=f"^{tmp_path / name} begins with a byte order mark: accepted is UTF-8"):
        open_family(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "scheduler", "vae", "transformer"])
def test_a_missing_folder_is_named(part: str, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(BundleError, match=f"^{tmp_path} has no folder {part}, although its model_index.json names it$"):
        open_family(tmp_path)


def test_a_part_that_is_given_needs_no_folder(tmp_path: Path) -> None:
    pipe = tiny.flux()
    pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    assert open_family(tmp_path, parts={"transformer": pipe.transformer}).transformer is pipe.transformer


def test_pickles_and_single_files_are_refused(tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(BundleError, match=r"\.bin is a pickle, .*: accepted are weights as safetensors"):
        open_family(tmp_path)
    file = tmp_path / "flux.safetensors"
    file.write_bytes(b"")
    with pytest.raises(BundleError, match=f"^{file} is a single file: accepted is a folder"):
        open_family(file)


@pytest.mark.parametrize(
    "name, near",
    [
        ("FluxKontextPipeline", "FluxPipeline"),
        ("FluxControlNetImg2ImgPipeline", "FluxPipeline"),
        ("Flux2KleinInpaintPipeline", "Flux2KleinPipeline"),
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        ("QwenImageEditPlusPipeline", "QwenImagePipeline"),
        ("StableDiffusion3InpaintPipeline", "StableDiffusion3Pipeline"),
        ("WanImageToVideoPipeline", "WanPipeline"),
        ("ZImageImg2ImgPipeline", "ZImagePipeline"),
    ],
)
def test_a_near_pipeline_is_told_which_of_its_kind_is_supported(name: str, near: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    sentence = f"^{tmp_path} is a {name}: of its kind only {near}, text to image or video, is supported"
    with pytest.raises(BundleError, match=sentence):
        open_family(tmp_path)


def test_every_other_pipeline_of_a_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """Edit, control, inpaint and whatever else this diffusers has: none is taken for the one that is supported."""
    kinds = ("Flux", "QwenImage", "StableDiffusion3", "Wan", "ZImage")
    others = [name for name in dir(diffusers) if name.startswith(kinds) and name.endswith("Pipeline")]
    others = [name for name in others if name not in FAMILIES]
    assert len(others) > 30
    for name in others:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(BundleError, match="text to image or video, is supported") as caught:
            open_family(tmp_path)
        assert all(supported in str(caught.value) for supported in FAMILIES)
