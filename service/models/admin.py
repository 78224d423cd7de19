"""The operator's actions on models: load, promote, unload."""

from __future__ import annotations

import asyncio
import time

from service.errors import Conflict, ModelRefused, NotFound
from service.models.controller import ModelController, Version
from service.models.folder import Name
from service.models.registry import ModelState
from service.quality.canary import Canary, Plan
from student.bundle import BundleError

POLL_EVERY_S = 0.1
UNKNOWN = "There is no such model or version."


async def load(controller: ModelController, name: Name, wait_s: float) -> Version:
    """Load a version; its state is ``serving`` or, after the wait, still ``loading``.

    Raises:
        NotFound, ModelRefused, Conflict, RedisError
    """
    await controller.refresh()
    if name not in controller.folder.names():
        raise NotFound(UNKNOWN, "version", code="model_not_found")
    try:
        await asyncio.to_thread(controller.folder.student, name)
    except BundleError as error:
        raise ModelRefused(f"{name} is refused: {error}.", "version") from error
    await controller.load(name)
    found = await _settled(controller, name, {ModelState.LOADING}, wait_s)
    if found.state == ModelState.REFUSED:
        raise ModelRefused(f"{name} is refused: {found.reason}.", "version")
    return found


async def promote(controller: ModelController, name: Name) -> Version:
    """Make a served version the latest.

    Raises:
        NotFound, Conflict, RedisError
    """
    await controller.refresh()
    _known(controller, name)
    if not await controller.registry.promote(name.id, name.version):
        raise Conflict(f"{name} is not served: load it first.", "version")
    await controller.refresh()
    return controller.version(name)


async def start_canary(controller: ModelController, name: Name, share: float, plan: Plan, wait_s: float) -> Canary:
    """Compare a version with its model's latest one; it is loaded first where it is not.

    Raises:
        NotFound, ModelRefused, Conflict, RedisError
    """
    await controller.refresh()
    if name not in controller.choice.served:
        await load(controller, name, wait_s)
    await controller.refresh()
    base = controller.choice.latest(name.id)
    both = [controller.choice.served.get(each) for each in (Name(name.id, str(base)), name)]
    if None not in both and not set.intersection(*(set(each.student.scorers) for each in both if each)):
        raise Conflict(f"{name} has no scorer that {base} has: there is nothing to compare them by.", "version")
    word = await controller.registry.start_canary(name.id, name.version, share, plan)
    if word == "missing":
        raise Conflict(f"{name} is not served yet: wait until it is loaded.", "version")
    if word == "latest":
        raise Conflict(f"{name} is the latest of its model: there is nothing to compare it with.", "version")
    if word == "running":
        raise Conflict(f"Another canary of {name.id} is running: stop it first.", "version")
    await controller.refresh()
    return controller.states.canaries[name.id]


async def stop_canary(controller: ModelController, name: Name) -> Canary:
    """Stop comparing; the latest version stays so, and both stay served.

    Raises:
        NotFound, RedisError
    """
    await controller.refresh()
    canary = controller.states.canaries.get(name.id)
    if canary is None or canary.candidate != name.version:
        raise NotFound(f"There is no canary of {name}.", "version")
    await controller.registry.end_canary(canary, "stopped", "by the operator")
    await controller.refresh()
    return controller.states.canaries[name.id]


async def unload(controller: ModelController, name: Name, wait_s: float) -> Version:
    """Unload a version; its state is ``unloaded`` or, after the wait, still ``unloading``.

    Raises:
        NotFound, Conflict, RedisError
    """
    await controller.refresh()
    _known(controller, name)
    word = await controller.registry.unload(str(name))
    if word == "promoted":
        raise Conflict(f"{name} is the latest version of its model: promote another one first.", "version")
    if word == "last":
        raise Conflict(f"{name} is the only served model: load another one first.", "version")
    if word == "missing" and controller.version(name).state not in (ModelState.UNLOADING, ModelState.UNLOADED):
        raise Conflict(f"{name} is not served.", "version")
    return await _settled(controller, name, {ModelState.SERVING, ModelState.UNLOADING}, wait_s)


def _known(controller: ModelController, name: Name) -> None:
    if name not in [version.name for version in controller.versions()]:
        raise NotFound(UNKNOWN, "version", code="model_not_found")


async def _settled(controller: ModelController, name: Name, moving: set[ModelState], wait_s: float) -> Version:
    """The version once it has left the states in ``moving``, or after ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while True:
        await controller.refresh()
        version = controller.version(name)
        if version.state not in moving or time.monotonic() >= deadline:
            return version
        await asyncio.sleep(POLL_EVERY_S)
