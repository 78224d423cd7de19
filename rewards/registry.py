"""Rewards by name: the shipped ones, the starter world's scorers, and a user's own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from rewards.aesthetic import aesthetic
from rewards.blackbox import BlackBox
from rewards.clip import clip_score, pickscore
from rewards.detector import geneval
from rewards.files import FILES
from rewards.hps import hps
from rewards.hpsv3 import hpsv3
from rewards.imagereward import imagereward
from rewards.interface import Reward, RewardError, named, said
from rewards.tokenized import Tokenize, load

SHIPPED: Mapping[str, Callable[[Path], Reward]] = {
    "pickscore": pickscore,
    "hpsv2.1": hps,
    "imagereward": imagereward,
    "clip": clip_score,
    "aesthetic": aesthetic,
    "geneval": geneval,
    "hpsv3": hpsv3,
}
SCORER = "shapes:"
_OWN = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


def find(
    name: str,
    *,
    tokenizer: Tokenize | Path | None = None,
    files: Path = FILES,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The reward called ``name``, its weights frozen, on ``device``.

    A name is a shipped one (``SHIPPED``), ``shapes:FOLDER`` or just the folder of a scorer of the starter world, or
    ``package.module:Class``; a function in place of the class is a black box. ``tokenizer`` is for the scorers only.
    ``files`` is the folder of downloaded and converted checkpoints.

    Raises:
        RewardError: no such reward, one whose files are missing, or a user's own that cannot be imported, created or
            called; one sentence says what to do.
    """
    with named(f"reward {name!r} cannot be opened"):
        reward = _make(name, tokenizer, files)
    if isinstance(reward, nn.Module):
        try:
            reward.eval().requires_grad_(False).to(device, dtype)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
            raise RewardError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return reward


def _make(name: str, tokenizer: Tokenize | Path | None, files: Path) -> Reward:
    if name in SHIPPED:
        return SHIPPED[name](files)
    if name.startswith(SCORER) or (name and Path(name).is_dir()):
        return load(Path(name.removeprefix(SCORER)), tokenizer)
    own = _OWN.fullmatch(name)
    if own:
        return _own(name, own[1], own[2])
    near = difflib.get_close_matches(name.lower(), SHIPPED, 2, 0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? Accepted are" if near else "accepted are"
    raise RewardError(f"unknown reward {name!r}: {hint} {', '.join(SHIPPED)}, {SCORER}FOLDER and package.module:Class")


def _own(name: str, module_name: str, attribute: str) -> Reward:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(f"reward {name!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # a user's module may do anything
        raise RewardError(f"reward {name!r} cannot be imported: {said(error)}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), 1, 0.5)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"reward {name!r}: {module_name} has no {attribute!r}{hint}")
    target = getattr(module, attribute)
    if inspect.isclass(target):
        return _checked(name, _instance(name, target))
    if callable(target) and not hasattr(target, "score"):
        _check_call(name, "it", target)
        return BlackBox(target)
    return _checked(name, target)


def _instance(name: str, kind: Callable[[], object]) -> object:
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} requires constructor arguments ({error}): accepted is a class without any"
        ) from error
    with named(f"reward {name!r} cannot be created"):
        return kind()


def _checked(name: str, made: object) -> Reward:
    score = getattr(made, "score", None)
    if not callable(score):
        raise RewardError(f"reward {name!r} has no method score(images_BCHW, prompts)")
    _check_call(name, "its score", score)
    if not isinstance(getattr(made, "differentiable", None), bool):
        raise RewardError(f"reward {name!r} must define 'differentiable = True' or 'differentiable = False'")
    reward: Reward = made  # type: ignore[assignment]
    return reward


def _check_call(name: str, what: str, function: Callable[..., object]) -> None:
    try:
        inspect.signature(function).bind("images_BCHW", "prompts")
    except TypeError as error:
        raise RewardError(f"reward {name!r}: {what} cannot be called with (images_BCHW, prompts): {error}") from error
    except ValueError:  # a function without a signature, such as one written in C: the first call shows it
        return


def fingerprint(name: str, reward: Reward) -> str:
    """sha256 of what a reward's scores depend on: its name, its weights, and the code of a user's own class."""
    digest = hashlib.sha256(name.encode())
    own = _OWN.fullmatch(name) if name not in SHIPPED else None
    module = importlib.util.find_spec(own[1]) if own else None
    if module is not None and module.origin is not None and module.has_location:
        digest.update(Path(module.origin).read_bytes())
    if isinstance(reward, nn.Module):
        for key, value in reward.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse(text: str) -> dict[str, float]:
    """``"pickscore:1.0,hpsv2.1:0.5"`` -> weights by name; without ``:weight`` it is 1, and it may be negative.

    Raises:
        RewardError: no name, a name twice, or a weight that is 0 or not finite.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, weight = _weighted(part.strip())
        if not name or name in weights:
            said = f"names {name!r} twice" if name else "has an empty name"
            raise RewardError(f"rewards {text!r} {said}: accepted is NAME:WEIGHT,NAME:WEIGHT with different names")
        if not math.isfinite(weight) or weight == 0:
            raise RewardError(f"reward {name!r} has weight {weight}: accepted is a finite number other than 0")
        weights[name] = weight
    return weights


def _weighted(part: str) -> tuple[str, float]:
    name, _, tail = part.rpartition(":")
    if _OWN.fullmatch(part) and name not in SHIPPED:
        return part, 1.0  # a class may be called NaN or Inf
    try:
        return name.strip(), float(tail)
    except ValueError:
        return part, 1.0
