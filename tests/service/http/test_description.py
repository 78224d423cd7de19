"""The description of the API is true: schemathesis makes requests from it and finds nothing that it does not say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.keys import SCOPES, KeyStore
from tests.service.support import Service, call, running_service

CONFIG = Path(__file__).with_name("schemathesis.toml")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LIMIT_S = 60  # schemathesis stops there by itself, wherever it is
ENDS_WORKERS = "^/admin/workers/.+/(pause|drain)$"  # it uses ids that it has read: no worker would be left


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of its own: schemathesis sends again what it reads, and other tests have jobs whose prompts fail."""
    with running_service(tmp_path_factory.mktemp("described") / "data") as service:
        yield service


def described(live: Service) -> dict[str, Any]:
    description: dict[str, Any] = call("GET", f"{live.url}/openapi.json").json()
    return description


def explore(
    live: Service, examples: int, *more: str, description: Path | None = None, limit_s: int = LIMIT_S,
    phases: str = "examples,coverage,fuzzing",
) -> None:  # fmt: skip
    """Let schemathesis search for what the description does not say; it fetches it itself unless it is given one."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run",
        str(description or f"{live.url}/openapi.json"), "--url", live.url,
        "--exclude-path-regex", ENDS_WORKERS,
        "--phases", phases, "--max-examples", str(examples), "--max-time", str(limit_s),
        "--seed", "1", "--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off", "--no-color",
        *more,
    ]  # fmt: skip
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6 * LIMIT_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_schemathesis_finds_no_undocumented_status_and_no_server_error(live: Service) -> None:
    explore(live, 15, "--checks", CHECKS)


def test_nor_with_keys(keyed: tuple[Service, KeyStore]) -> None:
    """With a key that may do everything; and without it, or with another one, nothing but 401.

    Boundary values of the fields are covered above, where no key is needed: here each operation gets a few requests.
    """
    service, keys = keyed
    _, text = keys.create("explorer", SCOPES)
    more = ("--checks", f"{CHECKS},ignored_auth", "--header", f"Authorization: Bearer {text}")
    explore(service, 5, *more, limit_s=40, phases="fuzzing")


@pytest.mark.parametrize("scopes", [(), ("read",)], ids=["unknown", "of another scope"])
def test_nor_with_a_key_that_may_not(keyed: tuple[Service, KeyStore], scopes: tuple[str, ...], tmp_path: Path) -> None:
    service, keys = keyed
    _, reading = keys.create("reader", ["read"])
    text = reading if scopes else f"{reading[:-1]}{'0' if reading[-1] != '0' else '1'}"
    description = tmp_path / "openapi.json"
    description.write_bytes(
        call("GET", f"{service.url}/openapi.json", headers={"Authorization": f"Bearer {reading}"}).content
    )
    more = ("--checks", CHECKS, "--header", f"Authorization: Bearer {text}")
    # The key is refused before the request is read, so one request for each operation says all there is.
    explore(service, 1, *more, description=description, limit_s=20, phases="fuzzing")


def test_every_field_of_a_body_and_of_an_answer_is_described(live: Service) -> None:
    """Names that say all there is to say need no words."""
    plain = {"model", "model_version", "prompt", "priority", "error", "data", "id", "object", "owned_by", "version",
             "latest", "max_prompt_tokens", "output_format", "size", "text_tokens", "image_tokens", "input_tokens",
             "output_tokens", "total_tokens", "input_tokens_details", "usage", "background"}  # fmt: skip
    schemas = described(live)["components"]["schemas"]
    assert {"GenerateRequest", "ImagesRequest", "JobStatus", "ErrorResponse", "ModelList"} <= set(schemas)
    silent = {
        (schema, field)
        for schema, parts in schemas.items()
        for field, about in parts.get("properties", {}).items()
        if "description" not in about and field not in plain
    }
    assert silent == set()


def test_every_error_has_an_example_in_the_one_form(live: Service) -> None:
    for path, operations in described(live)["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and status != "416":  # that one has no body
                    example = response["content"]["application/json"]["example"]
                    assert set(example["error"]) == {"message", "type", "param", "code"}, (path, method, status)


def test_an_openai_client_is_told_400_where_others_are_told_422(live: Service) -> None:
    paths = described(live)["paths"]
    assert "422" not in paths["/v1/images/generations"]["post"]["responses"]
    assert "422" in paths["/generate"]["post"]["responses"]
