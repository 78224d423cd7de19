"""Where a teacher comes from and under which licence, according to its own model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from huggingface_hub import ModelCard
from yaml import YAMLError

HUB, CARD = "https://huggingface.co", "README.md"


@dataclass(frozen=True)
class Origin:
    """``name`` is a hub id or a local folder's name; fields that the card does not have are empty.

    ``terms`` is the file with the licence's text, if the teacher's folder has one.
    """

    name: str
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    terms: Path | None = None


def origin(model: str) -> Origin:
    """Read the card of a model, given its folder or hub id (from the hub's cache where there is no network)."""
    folder = Path(model) if Path(model).is_dir() else None
    name = folder.resolve().name if folder else model
    try:
        data = ModelCard.load(folder / CARD if folder else model).data
    except (OSError, ValueError, YAMLError):  # none there, no network, or not readable: the hub's errors are OSErrors
        return Origin(name)
    said, named, link = (_text(data.get(key)) for key in ("license", "license_name", "license_link"))
    if folder is None:
        return Origin(name, said, named, urljoin(f"{HUB}/{model}/blob/main/", link) if link else "")
    terms = folder / link if link and not urlsplit(link).scheme else folder / "LICENSE"
    return Origin(name, said, named, link, terms if terms.is_file() else None)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
