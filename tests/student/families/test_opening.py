"""Why a pipeline cannot be opened, in one sentence: files that are broken, and hub ids that are not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from student.bundle import BundleError
from student.families.find import open_family
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
        "owner/gated cannot be opened: it is gated, so accept its licence at https://huggingface.co/owner/gated "
        "and log in with `hf auth login` or HF_TOKEN",
        "nobody/nothing cannot be opened as a folder or as a hub id: there is none of that name, or it is gated or "
        "private; then accept its licence at https://huggingface.co/nobody/nothing and log in with `hf auth login` "
        "or HF_TOKEN",
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
