"""What is declared is what is imported, and the lock files hold all of it, with hashes and without a host's name."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.test_imports import ROOMS, imports

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = {"PIL": "pillow", "c2pa": "c2pa-python", "opentelemetry": "opentelemetry-api", "yaml": "pyyaml"}
# What comes with torch and diffusers, for whoever has them.
TORCH = {"diffusers", "huggingface-hub", "safetensors", "torch", "transformers"}
SIGNING = {"c2pa-python", "cryptography"}  # what a service that signs its pictures needs
TRACING = {"opentelemetry-api"}  # service/observe/spans.py, for whoever has the extra otel
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = SETUP["project"]
BY_NAME = {"uvloop"}  # what uvicorn takes as its loop where it is there
PLOTS = {"matplotlib"}  # fewstep/load/plot.py, for whoever has the extra bench
NARROW = {"bitsandbytes", "torchao"}  # training/quantise.py, for whoever has the extra quantised
LOCKS = {"serve": None, "dev": "dev"}


def distribution(name: str) -> str:
    return DISTRIBUTION.get(name, name).lower().replace("_", "-")


def declared(extra: str | None) -> set[str]:
    """What an extra asks for, with what it includes; the base dependencies are part of each."""
    lines, extras = list(PROJECT["dependencies"]), [extra] if extra else []
    for name in extras:  # grows while it is read
        more = PROJECT["optional-dependencies"][name]
        extras += [line[len("fewstep[") : -1] for line in more if line.startswith("fewstep[")]
        lines += [line for line in more if not line.startswith("fewstep[")]
    return {distribution(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}


def third_party(room: str) -> set[str]:
    """The distributions that a room's modules name in an import."""
    found = {name.split(".")[0] for path in (ROOT / room).rglob("*.py") for name in imports(path)}
    own = {*ROOMS, "tests", "deploy", "benchmarks"}
    return {distribution(name) for name in found - own - set(sys.stdlib_module_names)}


@pytest.mark.parametrize(
    ("room", "extra", "beyond"),
    [
        ("service", None, SIGNING | TRACING),
        # its torch runtime is there for whoever has torch
        ("student", None, TORCH),
        ("rewards", "train", set()),
        ("training", "train", NARROW),
        ("export", "export", set()),
        ("fewstep", None, PLOTS),
        ("deploy", None, set()),
        ("tests", "dev", set()),
    ],
)
def test_every_import_is_declared(room: str, extra: str | None, beyond: set[str]) -> None:
    assert third_party(room) - declared(extra) == beyond


def test_serving_asks_for_nothing_that_it_does_not_import() -> None:
    needed = third_party("service") | third_party("student") | third_party("fewstep")
    assert declared(None) == (needed - TORCH - SIGNING - TRACING - PLOTS) | BY_NAME
    assert declared("c2pa") == declared(None) | SIGNING


@pytest.mark.parametrize(("lock", "extra"), LOCKS.items())
def test_a_lock_file_holds_what_is_declared_with_hashes(lock: str, extra: str | None) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text("utf-8")
    pins = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    names = {distribution(pin.split("==")[0]) for pin in pins}
    assert all(re.match(r"[\w.-]+==\S+", pin) and "--hash=sha256:" in pin for pin in pins)
    assert declared(extra) - names == (declared(extra) & {"torch"})
    assert not re.search(r"https?://|file:|index-url|find-links|^torch==|^nvidia", text, flags=re.MULTILINE)


def test_the_lock_file_of_the_gpu_image_has_what_it_needs_with_hashes_and_no_host() -> None:
    """It is for one platform, so torch is in it."""
    text = (ROOT / "requirements" / "gpu.lock").read_text("utf-8")
    pins = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    names = {distribution(pin.split("==")[0]) for pin in pins}
    assert all(re.match(r"[\w.-]+==\S+", pin) and "--hash=sha256:" in pin for pin in pins)
    assert declared("gpu") - names == {"onnxruntime"} and "torch==2.13.0 " in text
    assert {"onnxruntime-gpu", "tensorrt-cu13-bindings", "tensorrt-rtx-cu13"} <= names
    assert not re.search(r"https?://|file:|index-url|find-links", text)


def test_the_lock_file_of_quantised_bases_is_that_extra_alone() -> None:
    """Beside the lock for development: what it holds writes to stderr wherever it is installed without a GPU."""
    text = (ROOT / "requirements" / "quantised.lock").read_text("utf-8")
    assert {pin.split("==")[0] for pin in re.findall(r"^[\w.-]+==", text, re.M)} == NARROW
    asked = (ROOT / "requirements" / "quantised.in").read_text("utf-8").splitlines()
    assert [line for line in asked if not line.startswith("#")] == PROJECT["optional-dependencies"]["quantised"]
    assert not NARROW & declared("dev")


def test_every_line_of_every_lock_file_has_a_hash() -> None:
    locks = {path.stem: path.read_text("utf-8") for path in (ROOT / "requirements").glob("*.lock")}
    assert set(locks) >= {*LOCKS, "gpu", "audit"}
    for text in locks.values():
        pins = re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE)[1:]
        assert (
            pins
            and [pin for pin in pins if not re.match(r"[\w.-]+==\S+.* \\\n +--hash=sha256:[0-9a-f]{64}", pin)] == []
        )
        assert not re.search(r"https?://|file:|index-url|find-links", text)


def test_both_lock_files_agree() -> None:
    def versions(lock: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==[^\\]+", (ROOT / "requirements" / f"{lock}.lock").read_text("utf-8"), re.M))

    assert versions("serve") <= versions("dev")


def test_the_image_holds_the_rooms_that_serving_imports() -> None:
    room_of = {name.split(".")[0] for path in (ROOT / "service").rglob("*.py") for name in imports(path)}
    needed = (room_of | {"service", "fewstep"}) & set(ROOMS)
    copied = set(re.findall(r"^COPY (\w+) /app/\1$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)) - {"models"}
    sent = set(re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M)) - {"LICENSE"}
    assert copied == sent == needed


def test_every_room_is_typed_for_who_imports_it() -> None:
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []
    assert SETUP["tool"]["setuptools"]["package-data"]["*"] == ["py.typed"]


def test_pre_commit_runs_what_is_installed_and_fetches_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks} <= {"system", "pygrep"}
    programs = {hook["entry"].split()[0] for hook in hooks if hook["language"] == "system"}
    assert programs == {".venv/bin/ruff", ".venv/bin/mypy"}
    assert {"ruff", "mypy"} <= declared("dev")


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["title"], citation["version"], citation["license"]) == tuple(
        PROJECT[key] for key in ("name", "version", "license")
    )
