"""The base of a student that carries nothing but its adapter: a pipeline on this machine, which ``base.json`` names.

A student of FLUX takes 100 MB so, in place of 34 GB. Its tokenizers and its schedule lie in the bundle all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from student.bundle import BundleError

BASE, ADAPTER = "base.json", "adapter"
NETWORKS = ("transformer", "transformer_2")  # of a pipeline; Wan 2.2 14B has the second


@dataclass(frozen=True)
class Base:
    """``model`` is a folder, or with ``revision`` (its commit) a hub id; ``files`` has the sha256 of what is read."""

    model: str
    revision: str | None
    files: Mapping[str, str]

    def folder(self) -> Path:
        """Where it lies; one of the hub must have been fetched.

        Raises:
            BundleError: it is not on this machine.
        """
        if self.revision is None:
            if Path(self.model).is_dir():
                return Path(self.model)
            raise BundleError(f"the base {self.model} is not there: accepted is that folder")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.model, revision=self.revision, local_files_only=True))
        except (OSError, ValueError) as error:
            fetch = f"`hf download {self.model} --revision {self.revision}` fetches it"
            raise BundleError(f"the base {self.model} is not on this machine: {fetch}") from error


def read_base(bundle: Path) -> Base | None:
    """The base that a bundle names; None of one that holds its whole pipeline.

    Raises:
        BundleError: the file cannot be read.
    """
    path = bundle / BASE
    if not path.is_file():
        return None
    try:
        return Base(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def pipeline_folder(bundle: Path) -> Path:
    """Where the weights of a bundle's pipeline lie: in itself, or in its base.

    Raises:
        BundleError: the base is not on this machine.
    """
    base = read_base(bundle)
    return bundle if base is None else base.folder()


def adapter_folder(adapter: Path, network: str) -> Path:
    """Where the adapter of a network of this name lies: that of a second expert (``transformer_2``) has its own folder,
    since diffusers reads one file of a folder.
    """
    return adapter if network == NETWORKS[0] else adapter / network
