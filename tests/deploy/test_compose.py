"""What can be said of the containers without an engine; ``make docker-test`` says the rest with one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.queue.connection import CALL_TIMEOUT_S
from service.settings import PREFIX, SECRETS_DIR, Settings

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "docker-compose.yml", ROOT / "deploy/compose.debian.yml", ROOT / "deploy/compose.gpus.yml"]
MAIN: dict[str, Any] = yaml.safe_load(FILES[0].read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = MAIN["services"]
GPUS: dict[str, dict[str, Any]] = yaml.safe_load(FILES[2].read_text("utf-8"))["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
IGNORED = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def stages() -> dict[str, str]:
    found = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    return {name: f"{base}\n{body}" for base, name, body in found}


def test_the_gpu_image_takes_tensorrts_libraries_of_the_release_of_its_bindings_where_it_is_given_nvidias_index() -> (
    None
):
    stage = stages()["gpu-dependencies"]
    assert re.search(r"^ARG NVIDIA_INDEX=$", stage, re.M) and '[ -z "$NVIDIA_INDEX" ] ||' in stage
    [expression] = re.findall(r"\$\((sed -n '.*' )/tmp/gpu.lock\)", stage)
    lock = ROOT / "requirements" / "gpu.lock"
    found = subprocess.run(f"{expression} '{lock}'", shell=True, capture_output=True, text=True, check=True).stdout
    [release] = re.findall(r"^tensorrt-cu13-bindings==(\S+)", lock.read_text("utf-8"), re.M)
    assert found.split() == [f"tensorrt-cu13=={release}", f"tensorrt-cu13-libs=={release}"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_hardened_and_nothing_but_ports_on_this_host_is_published(service: str) -> None:
    asked = SERVICES[service]
    assert asked["read_only"] is True and asked["security_opt"] == ["no-new-privileges:true"]
    assert service == "valkey" or asked["cap_drop"] == ["ALL"]  # its image becomes another user first
    for port in asked.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${FEWSTEP_PUBLISH:-127.0.0.1}:"))
    assert "ports" not in SERVICES["valkey"] and "ports" not in SERVICES["worker"]


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "init"])
def test_a_container_waits_until_what_it_needs_is_healthy(service: str) -> None:
    needed = SERVICES[service]["depends_on"]
    assert needed["init"] == {"condition": "service_completed_successfully"}
    assert all(how["condition"] == "service_healthy" for name, how in needed.items() if name != "init")
    image = SERVICES[service]["image"].removeprefix("fewstep-")
    assert "healthcheck" in SERVICES[service] or "HEALTHCHECK" in stages()[image]


def test_secrets_are_mounted_by_whom_they_are_for_and_never_in_an_environment() -> None:
    holders = {
        name: {mount.split(":")[0] for mount in service.get("volumes", []) if "-secret:" in mount}
        for name, service in SERVICES.items()
    }
    assert holders.pop("init") == {"queue-secret", "metrics-secret", "grafana-secret"}
    assert holders == {
        "valkey": {"queue-secret"}, "api": {"queue-secret"}, "worker": {"queue-secret"}, "worker-gpu": {"queue-secret"},
        "prometheus": {"metrics-secret"}, "grafana": {"grafana-secret"},
    }  # fmt: skip
    for name, service in {**SERVICES, **GPUS}.items():
        mounts = [mount for mount in service.get("volumes", []) if "-secret:" in mount]
        assert name == "init" or all(mount.endswith(":ro") for mount in mounts)
        for variable in service.get("environment", {}):
            assert not re.search("PASSWORD$|TOKEN|SECRET$|_KEY|REDIS_URL", variable)


def test_only_who_makes_and_checks_keys_can_write_them() -> None:
    """They lie in /data; a worker that was broken into must not be able to add one."""
    mounts = {
        name: {mount.split(":")[1] for mount in service.get("volumes", [])}
        for name, service in {**SERVICES, **GPUS}.items()
    }
    assert {name for name, targets in mounts.items() if "/data" in targets} == {"init", "api", "valkey"}
    sources = {name: {m.split(":")[0] for m in service.get("volumes", [])} for name, service in SERVICES.items()}
    assert {name for name, found in sources.items() if "results" in found} == {"init", "api"}
    for name in ("worker", "worker-gpu", "api"):
        assert "pictures:/data/results" in SERVICES[name]["volumes"], "where the workers put what the API hands out"
    assert re.search(r"install -d .*/data/results", DOCKERFILE), "a volume takes over its owner from this folder"


def test_the_environment_holds_settings_that_exist_and_time_to_stop() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {SECRETS_DIR}
    for name in ("api", "worker", "worker-gpu"):
        environment = SERVICES[name]["environment"]
        assert set(environment) <= known
        assert "FEWSTEP_INSECURE" not in environment
        grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s >= int(environment["FEWSTEP_GRACE_S"]) + CALL_TIMEOUT_S


def test_each_gpu_has_one_worker_and_a_profile_brings_that_many() -> None:
    workers = {"worker-gpu": SERVICES["worker-gpu"], **GPUS}
    devices = [worker["deploy"]["resources"]["reservations"]["devices"] for worker in workers.values()]
    assert [(d["driver"], d["device_ids"], d["capabilities"]) for (d,) in devices] == [
        ("nvidia", [str(number)], ["gpu"]) for number in range(8)
    ]
    for count in (2, 4, 8):
        assert sum(f"gpus-{count}" in worker["profiles"] for worker in GPUS.values()) == count - 1
    ours = {key: value for key, value in SERVICES["worker-gpu"].items() if key not in ("profiles", "build", "deploy")}
    for worker in GPUS.values():
        assert {key: value for key, value in worker.items() if key not in ("profiles", "deploy")} == ours


def test_prometheus_is_told_where_the_token_and_the_api_are() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert job["authorization"]["credentials_file"] == "/secrets/metrics/token"
    assert "metrics-secret:/secrets/metrics:ro" in SERVICES["prometheus"]["volumes"]
    (named,) = job["dns_sd_configs"]
    assert named["names"] == ["api"] and "api" in SERVICES and named["port"] == 8000


def test_final_stages_have_no_build_tools_and_run_as_nobody_in_particular() -> None:
    found = stages()
    for name in ("api", "worker-cpu", "worker-gpu", "queue", "bare", "runtime"):
        assert not re.search(r"\bpip\b|PIP_|gcc|build-essential", found[name]), name
    for name in ("runtime", "queue", "worker-gpu"):  # a number: Kubernetes cannot tell of a name that it is not root
        assert re.findall(r"^USER (\S+)", found[name], re.M)[-1] == "10001:10001"
    for name in ("dependencies", "gpu-dependencies"):
        assert "--require-hashes" in found[name] and "--no-deps" in found[name]
    labels = ("title", "description", "licenses", "version", "revision")
    assert all(f"org.opencontainers.image.{label}=" in found["bare"] for label in labels)
    for lock in set(re.findall(r"\w+\.lock", DOCKERFILE + FILES[0].read_text("utf-8"))):
        assert (ROOT / "requirements" / lock).exists() and f"!requirements/{lock}" in IGNORED, lock
    order = list(found)
    assert order.index("api") < order.index("gpu-dependencies"), "a plain builder would fetch CUDA for the API's image"


@pytest.mark.skipif(
    subprocess.run([*COMPOSE, "version"], capture_output=True).returncode != 0 if shutil.which(COMPOSE[0]) else True,
    reason="neither docker-compose nor docker compose is installed",
)
@pytest.mark.parametrize("files", [FILES[:1], FILES[:2], [FILES[0], FILES[2]]], ids=["alone", "debian", "gpus"])
def test_compose_reads_the_files(files: list[Path]) -> None:
    named = [part for path in files for part in ("-f", str(path))]
    done = subprocess.run([*COMPOSE, *named, "--profile", "gpu", "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
