"""Which result store the settings mean."""

from __future__ import annotations

from service.errors import StartupError
from service.results.bucket import BucketStore
from service.results.folder import FolderStore
from service.results.memory import MemoryStore
from service.results.store import ResultStore
from service.settings import Settings


def open_store(settings: Settings) -> ResultStore:
    """The store; nothing is asked of it yet.

    Raises:
        StartupError: it needs a package that is not there, or would be the queue's own server.
    """
    url = settings.results
    if url is None:
        return FolderStore(settings.results_dir)
    if url.startswith("s3://"):
        return BucketStore(url)
    if url == settings.redis_url:
        raise StartupError("FEWSTEP_RESULTS is the queue's own server: accepted are another server, s3:// or unset.")
    return MemoryStore(url, settings.result_ttl_s)
