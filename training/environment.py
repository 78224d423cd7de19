"""The environment of a run: code version, libraries, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "tokenizers", "safetensors")
ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, object]:
    """The environment as plain JSON values, without any path, host or user name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def code_version() -> str:
    """The commit of this code, with ``+`` where files were changed; ``unknown`` outside a git checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(path: Path) -> None:
    """Write ``describe`` as JSON."""
    path.write_text(json.dumps(describe(), indent=2) + "\n")
