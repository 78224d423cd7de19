"""Which of the served students a request names: pure rules over what is served at one moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import InvalidRequest, NotFound
from service.models.folder import Name, age
from service.quality.canary import Canary
from student.bundle import Student
from student.runtimes.sizes import Size

SHOWN_CHARS = 80
LATEST = "latest"


@dataclass(frozen=True)
class Served:
    """A student that requests can name; ``sizes`` are those besides its own."""

    student: Student
    count_tokens: Callable[[str], int]
    sizes: tuple[Size, ...] = ()

    @property
    def name(self) -> Name:
        return Name(self.student.id, self.student.version)


@dataclass(frozen=True)
class Choice:
    """What is served now; ``promoted`` is the version of each model that ``latest`` means, ``canaries`` what it is
    compared with."""

    served: Mapping[Name, Served]
    promoted: Mapping[str, str] = field(default_factory=dict)
    canaries: Mapping[str, Canary] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """The models that have a served version."""
        return sorted({name.id for name in self.served})

    def versions(self, id: str) -> list[str]:
        """The served versions of a model, the newest last."""
        return sorted((name.version for name in self.served if name.id == id), key=age)

    def latest(self, id: str) -> str | None:
        """The latest version: the promoted one, else the newest."""
        versions = self.versions(id)
        promoted = self.promoted.get(id)
        return promoted if promoted in versions else versions[-1] if versions else None

    def default(self) -> Served | None:
        """The only model's latest version, or the first one's where there are several."""
        first = next(iter(self.ids), None)
        return self.served[Name(first, str(self.latest(first)))] if first else None

    def canary(self, name: Name) -> tuple[Canary, Served] | None:
        """The canary that runs against a version, and its candidate; None if none does."""
        found = self.canaries.get(name.id)
        if found is None or not found.running or found.base != name.version:
            return None
        candidate = self.served.get(Name(name.id, found.candidate))
        return (found, candidate) if candidate else None

    def pick(self, id: str | None, version: str | None) -> Served:
        """The student that a request for this id and version gets.

        Raises:
            NotFound: it is not served.
            InvalidRequest: no model was named where several are served.
        """
        ids = self.ids
        if id is None and len(ids) > 1:
            raise InvalidRequest(f"model is required, as several are served: {', '.join(ids)}.", "model")
        if id is None and ids:
            id = ids[0]
        if id not in ids:
            raise NotFound(f"The model {_shown(id)} is not served: {_listed(ids)}.", "model", code="model_not_found")
        exact = self.latest(id) if version in (None, LATEST) else version
        if exact not in self.versions(id):
            message = f"Version {_shown(exact)} of model {id} is not served: {_listed(self.versions(id))}."
            raise NotFound(message, "model_version", code="model_not_found")
        return self.served[Name(id, str(exact))]


def _shown(text: object) -> str:
    return repr(str(text)[:SHOWN_CHARS])


def _listed(served: Sequence[str]) -> str:
    return f"accepted {'is' if len(served) == 1 else 'are'} {', '.join(served)}" if served else "none is"
