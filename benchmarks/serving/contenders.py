"""Who takes part: how each server is installed, started, asked and read; each in the form that its documents advise."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.engine import REPOSITORY

LOCK = REPOSITORY / "requirements" / "serve.lock"
ENGINE = ("numpy", "onnxruntime", "pillow", "tokenizers")  # in the same versions for all, so that bytes are equal


@dataclass(frozen=True)
class Form:
    """``workers`` processes of ``threads`` threads each; (0, 0): as the server chooses by itself."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}" if self.workers else "defaults"


@dataclass(frozen=True)
class Contender:
    """``requirements`` are installed into an environment of its own; none: those of the service's lock file."""

    name: str
    module: str
    requirements: tuple[str, ...] = ()
    body: Callable[[str, int, float], dict[str, Any]] = lambda prompt, seed, deadline_s: {
        "prompt": prompt,
        "seed": seed,
    }
    answer: Callable[[Any], Mapping[str, Any]] = lambda found: found

    def forms(self, cores: int) -> list[Form]:
        """What is tried out: a process for each core, or one with all of them."""
        return [Form(0, 0)] if self.module == "service.run" else [Form(cores, 1), Form(1, cores)]

    def command(self, python: Path, form: Form, port: int, deadline_s: float) -> list[str]:
        """What starts it in the foreground."""
        if self.module == "service.run":
            return [str(python), "-m", self.module]
        options = {"port": port, "workers": form.workers, "threads": form.threads, "deadline-s": deadline_s}
        return [
            str(python),
            "-m",
            self.module,
            *(part for name, v in options.items() for part in (f"--{name}", str(v))),
        ]

    def environment(self, python: Path, port: int, data: Path) -> dict[str, str]:
        """Its variables: those of this process, but for the settings of a service."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith(("FEWSTEP_", "OMP_", "BENCHMARK_"))}
        path = f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"
        ours = {"FEWSTEP_PORT": str(port), "FEWSTEP_DATA_DIR": str(data)} if self.module == "service.run" else {}
        return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0",
                "BENTOML_DO_NOT_TRACK": "1", **ours}  # fmt: skip

    def picture(self, found: Any) -> bytes:
        """The image file of an answer."""
        return base64.b64decode(self.answer(found)["data"][0]["b64_json"])


def _fewstep_body(prompt: str, seed: int, deadline_s: float) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, **({"timeout_s": deadline_s} if deadline_s else {})}


def _bento_body(prompt: str, seed: int, deadline_s: float) -> dict[str, Any]:
    return {"requests": [{"prompt": prompt, "seed": seed}]}


def _first(found: Any) -> Mapping[str, Any]:
    first: Mapping[str, Any] = found[0]
    return first


SERVERS = "benchmarks.serving.servers"
CONTENDERS = (
    Contender("fewstep", "service.run", body=_fewstep_body),
    Contender("LitServe", f"{SERVERS}.lit", ("litserve==0.2.19", "uvloop", "httptools")),
    Contender("BentoML", f"{SERVERS}.bento", ("bentoml==1.4.40", "uvloop", "httptools"), _bento_body, _first),
    Contender("Ray Serve", f"{SERVERS}.ray_serve", ("ray[serve]==2.60.0",)),
    Contender("plain FastAPI", f"{SERVERS}.plain_fastapi", ("fastapi", "uvicorn", "uvloop", "httptools")),
)


def environment_of(contender: Contender, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of a contender's environment, which is made if it is not there.

    Raises:
        RuntimeError: pip cannot install it.
    """
    home = folder / re.sub(r"\W+", "-", contender.name.lower())
    python, done = home / "bin" / "python", home / "requirements.txt"
    wanted = (
        "\n".join((*contender.requirements, *_engine_pins())) if contender.requirements else LOCK.read_text("utf-8")
    )
    if done.is_file() and done.read_text("utf-8") == wanted:
        return python
    say(f"installing {contender.name} into {home}")
    _run(contender.name, [sys.executable, "-m", "venv", "--clear", str(home)])
    part = home / "requirements.part"
    part.write_text(wanted, "utf-8")
    more = () if contender.requirements else ("--no-deps", "--require-hashes")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    _run(contender.name, [*pip, *more, "-r", str(part)])
    part.rename(done)
    return python


def _run(name: str, command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{name} cannot be installed: {lines[-1] if lines else ended.returncode}")


def _engine_pins() -> list[str]:
    """The lock file's versions of what the engine needs."""
    lines = LOCK.read_text("utf-8").splitlines()
    return [line.rstrip(" \\") for line in lines if line.split("==")[0] in ENGINE]
