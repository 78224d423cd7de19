"""A student on the Hugging Face hub: its card, pictures and figures, and its adapter or its whole pipeline."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from student.base import ADAPTER, BASE

RUN = "run/*"
BESIDE = ("README.md", "student.json", "calibration.txt", "*.png", "LICENSE*")


def push(out: Path, repository: str) -> str:
    """Upload what a run left in ``out`` (of a LoRA run the adapter in place of the pipeline); one sentence on how it
    went, for a hub that refuses does not undo a run.
    """
    is_whole = (out / ADAPTER).is_dir() and not (out / BASE).is_file()
    chosen = [*BESIDE, f"{ADAPTER}/*"] if is_whole else None
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, allow_patterns=chosen, ignore_patterns=[RUN])
    except Exception as error:  # it talks to somebody else's server
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the student could not be pushed to {repository}: {first}; it is complete in {out}"
    return f"the student is on the hub as {repository}"
