"""Which kind of tracing a process uses."""

from __future__ import annotations

from service.errors import StartupError
from service.observe.tracer import Role, Tracing
from service.settings import Settings


def open_tracing(settings: Settings, role: Role) -> Tracing:
    """The tracing that the settings ask for.

    Raises:
        StartupError: the packages for it are not installed.
    """
    if not settings.tracing:
        return Tracing()
    try:
        from service.observe.spans import exporting

        return exporting(role)
    except ImportError as error:
        raise StartupError(
            f"FEWSTEP_TRACING needs the extra otel, pip install 'fewstep[otel]' ({error.name} is not installed)."
        ) from error
