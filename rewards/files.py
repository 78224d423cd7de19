"""Finds the files of a published reward: in the user's own folder, in the hub's cache, or on the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from torch.hub import download_url_to_file

from rewards.interface import RewardError

FILES = Path.home() / ".cache" / "fewstep" / "rewards"


@dataclass(frozen=True)
class Published:
    """Files of one published model. ``repo`` is owner/name on the hub, or on GitHub where ``url`` is given.

    With ``url`` there is one file in ``names``, and a download must have this ``sha256``.
    """

    repo: str
    names: tuple[str, ...]
    url: str = ""
    sha256: str = ""

    @property
    def page(self) -> str:
        """Its web page."""
        return f"https://{'github.com' if self.url else 'huggingface.co'}/{self.repo}"

    def folder(self, files: Path) -> Path:
        """Its folder inside the user's folder of files."""
        return files / self.repo.rpartition("/")[2]


def locate(published: Published, files: Path) -> Path:
    """The folder that holds all files of ``published``: the one below ``files``, else the hub's cache.

    Raises:
        RewardError: they are not there and cannot be downloaded; the message says which files to put where.
    """
    folder = published.folder(files)
    if all((folder / name).is_file() for name in published.names):
        return folder
    try:
        return _download(published, folder)
    except (OSError, RuntimeError) as error:  # the hub's errors are OSErrors, a wrong hash is a RuntimeError
        raise RewardError(
            f"{', '.join(published.names)} of {published.page} cannot be downloaded ({_reason(error)}): "
            f"put {'them' if len(published.names) > 1 else 'it'} into {folder}"
        ) from error


def _download(published: Published, folder: Path) -> Path:
    if not published.url:
        return [Path(hf_hub_download(published.repo, name)) for name in published.names][0].parent
    folder.mkdir(parents=True, exist_ok=True)
    download_url_to_file(published.url, str(folder / published.names[0]), published.sha256, progress=False)
    return folder


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(". ")[0].rstrip(".:")
