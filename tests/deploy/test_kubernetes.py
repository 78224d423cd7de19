"""The manifests, as kustomize would put them together: right for Kubernetes' own schemas, and right for the service."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.http.access import PUBLIC
from service.http.server import STOP_MARGIN_S
from service.queue.scripts import prefix
from service.settings import PREFIX, SECRETS_DIR, Settings
from service.worker.process import STOP_MARGIN_S as WORKER_MARGIN_S
from student.bundle import read_student

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy/kubernetes/base"
GPU = ROOT / "deploy/kubernetes/gpu"
GPU_S3 = ROOT / "deploy/kubernetes/gpu-s3"
KUBERNETES = ("1.31.0", "1.34.0", kubernetes_validate.latest_version())
Manifest = dict[str, Any]


def resolved(folder: Path, found: list[Manifest] | None = None) -> list[Manifest]:
    """What ``kubectl kustomize`` would write, for the parts of it that are used here; an unknown part is an error.

    A component changes what was ``found`` before it.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    known = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images", "patches",
             "components"}  # fmt: skip
    assert set(kustomization) <= known
    found = found or []
    for name in kustomization.get("resources", []):
        path = folder / name
        found += resolved(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text("utf-8")))
    for generated in kustomization.get("configMapGenerator", []):
        data = dict(literal.split("=", 1) for literal in generated["literals"])
        if generated.get("behavior") == "merge":
            one(found, "ConfigMap", generated["name"])["data"].update(data)
        else:
            named = {"name": generated["name"]}
            found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": data})
    for patch in kustomization.get("patches", []):
        apply(patch, found)
    for name in kustomization.get("components", []):
        resolved(folder / name, found)
    for image in kustomization.get("images", []):
        changed = [c for m in found for c in containers(m) if c["image"].split(":")[0] == image["name"]]
        assert changed, f"{image['name']} is nobody's image"
        for container in changed:
            container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    if "namespace" in kustomization:
        for manifest in found:
            if manifest["kind"] != "Namespace":
                manifest["metadata"]["namespace"] = kustomization["namespace"]
    return found


def apply(patch: Manifest, found: list[Manifest]) -> None:
    """A patch of either kind; of JSON patches the one that is used."""
    target, change = one(found, *patch["target"].values()), yaml.safe_load(patch["patch"])
    if isinstance(change, list):
        ((op, path, value),) = (tuple(row.values()) for row in change)
        assert (op, path) == ("add", "/spec/egress/-")
        target["spec"]["egress"].append(value)
    elif change.get("$patch") == "delete":
        found.remove(target)
    else:
        merge(target, change)


def merge(into: Manifest, patch: Manifest) -> None:
    """A strategic merge, as far as maps and lists of named things go."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        elif value is None:
            into.pop(key, None)
        elif isinstance(value, list) and value and "name" in value[0] and key in into:
            for item in value:
                (named,) = (old for old in into[key] if old["name"] == item["name"])
                merge(named, item)
        else:
            into[key] = value


def containers(manifest: Manifest) -> list[Manifest]:
    return manifest["spec"]["template"]["spec"]["containers"] if manifest["kind"] == "Deployment" else []


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def pod(manifests: list[Manifest], name: str) -> Manifest:
    return one(manifests, "Deployment", name)["spec"]["template"]["spec"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[BASE, GPU, GPU_S3], ids=["base", "gpu", "gpu-s3"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return resolved(request.param)


@pytest.fixture(scope="module")
def settings(manifests: list[Manifest]) -> Manifest:
    return one(manifests, "ConfigMap", "fewstep")["data"]  # type: ignore[no-any-return]


def test_kubernetes_own_schemas_agree(manifests: list[Manifest]) -> None:
    """Of the custom kinds of KEDA no schema is at hand; the test of the scalers is about them."""
    checked = [manifest for manifest in manifests if not manifest["apiVersion"].startswith("keda.sh/")]
    assert len(checked) == len(manifests) - 2
    for manifest in checked:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("folder", [BASE, GPU, GPU_S3], ids=["base", "gpu", "gpu-s3"])
def test_kustomize_itself_makes_the_same_of_them(folder: Path) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The name of a generated map ends in the hash of its content.
    said = list(yaml.safe_load_all(re.sub(r"name: fewstep-[0-9a-z]{10}$", "name: fewstep", done.stdout, flags=re.M)))

    def sorted_(manifests: list[Manifest]) -> list[Manifest]:
        for manifest in manifests:
            if manifest["kind"] == "Deployment":
                manifest["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: str(volume["name"]))
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    assert sorted_(said) == sorted_(resolved(folder))


def test_with_a_bucket_nothing_is_shared_but_queue_and_store() -> None:
    manifests = resolved(GPU_S3)
    assert not [m for m in manifests if m["kind"] == "PersistentVolumeClaim"]
    settings = Settings(results=one(manifests, "ConfigMap", "fewstep")["data"]["FEWSTEP_RESULTS"])
    assert settings.results == "s3://fewstep/pictures"
    for name in ("fewstep-api", "fewstep-worker"):
        assert not [volume for volume in pod(manifests, name)["volumes"] if "persistentVolumeClaim" in volume]
        allowed = one(manifests, "NetworkPolicy", name)["spec"]["egress"]
        assert [rule["ports"][0]["port"] for rule in allowed] == [53, 6379, 443]
    for lock in ("s3.lock", "gpu.lock"):
        assert re.search(r"^s3fs==", (ROOT / "requirements" / lock).read_text("utf-8"), re.M)


def test_this_check_sees_a_misspelt_field() -> None:
    manifest = one(resolved(BASE), "Deployment", "fewstep-api")
    manifest["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES[0], strict=True)


def test_settings_exist_and_no_variable_is_injected_beside_them(manifests: list[Manifest], settings: Manifest) -> None:
    assert set(settings) <= {PREFIX + name.upper() for name in Settings.model_fields} | {SECRETS_DIR}
    for name in ("fewstep-api", "fewstep-worker"):
        assert pod(manifests, name)["enableServiceLinks"] is False
        (container,) = pod(manifests, name)["containers"]
        assert container["envFrom"][0] == {"configMapRef": {"name": "fewstep"}} and "env" not in container
        secrets = [source["secretRef"]["name"] for source in container["envFrom"][1:]]
        assert secrets == (["fewstep-s3"] if "FEWSTEP_RESULTS" in settings else [])


def test_pods_are_given_the_time_that_the_service_takes_to_stop(manifests: list[Manifest], settings: Manifest) -> None:
    drain_s, grace_s = float(settings["FEWSTEP_DRAIN_S"]), float(settings["FEWSTEP_GRACE_S"])
    api, worker = pod(manifests, "fewstep-api"), pod(manifests, "fewstep-worker")
    assert api["terminationGracePeriodSeconds"] > drain_s + math.ceil(grace_s) + STOP_MARGIN_S
    assert worker["terminationGracePeriodSeconds"] > grace_s + WORKER_MARGIN_S
    probe = api["containers"][0]["readinessProbe"]
    assert drain_s >= probe["periodSeconds"] * probe["failureThreshold"], (
        "a pod is still asked after it stops listening"
    )


def test_probes_are_addresses_without_a_key_and_outages_restart_nobody(manifests: list[Manifest]) -> None:
    (api,), (worker,) = (pod(manifests, f"fewstep-{name}")["containers"] for name in ("api", "worker"))
    paths = {name: api[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    assert set(paths.values()) <= set(PUBLIC)
    assert "livenessProbe" not in worker and worker["readinessProbe"]["exec"]["command"][-2:] == [
        "service.run",
        "probe",
    ]


def test_the_scalers_look_at_the_sets_that_the_queue_has(manifests: list[Manifest]) -> None:
    scaled = one(manifests, "ScaledObject", "fewstep-worker")["spec"]
    queue = prefix(read_student(ROOT / "models/shapes").id)
    lua = (ROOT / "service/queue/lua/claim.lua").read_text("utf-8")
    common = (ROOT / "service/queue/lua/_common.lua").read_text("utf-8")
    assert [trigger["metadata"]["listName"] for trigger in scaled["triggers"]] == [f"{queue}pending", f"{queue}l"]
    for name in ("pending", "l"):
        assert re.search(rf"redis\.call\('Z\w+', P \.\. '{name}'", lua + common)
    for trigger in scaled["triggers"]:
        assert trigger["type"] == "redis" and set(trigger) == {"type", "metadata", "authenticationRef"}
        assert set(trigger["metadata"]) == {"listName", "listLength", "activationListLength"}
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        login = one(manifests, "TriggerAuthentication", trigger["authenticationRef"]["name"])["spec"]
        assert {row["parameter"] for row in login["secretTargetRef"]} == {"address", "password"}
    assert scaled["scaleTargetRef"]["name"] == "fewstep-worker" and scaled["minReplicaCount"] >= 1
    for name in ("fewstep-api", "fewstep-worker"):  # another controller sets the number
        assert "replicas" not in one(manifests, "Deployment", name)["spec"]
    assert one(manifests, "HorizontalPodAutoscaler", "fewstep-api")["spec"]["scaleTargetRef"]["name"] == "fewstep-api"


def test_labels_find_the_pods_that_they_are_meant_for(manifests: list[Manifest]) -> None:
    for part in ("api", "worker"):
        deployment = one(manifests, "Deployment", f"fewstep-{part}")["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["selector"]["matchLabels"] == labels and labels["app.kubernetes.io/component"] == part
        for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            assert one(manifests, kind, f"fewstep-{part}")["spec"][field]["matchLabels"] == labels
    selector = one(manifests, "Service", "fewstep")["spec"]["selector"]
    assert selector == one(manifests, "Deployment", "fewstep-api")["spec"]["selector"]["matchLabels"]


def test_pods_may_do_as_little_as_the_restricted_standard_asks(manifests: list[Manifest]) -> None:
    for name in ("fewstep-api", "fewstep-worker"):
        spec = pod(manifests, name)
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"] and not allowed["allowPrivilegeEscalation"]
            assert allowed["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in spec["volumes"]}
    worker = one(manifests, "NetworkPolicy", "fewstep-worker")["spec"]
    assert worker["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in worker


def test_each_gpu_worker_has_one_gpu_and_the_image_for_it() -> None:
    (cpu,), (gpu,) = (pod(resolved(folder), "fewstep-worker")["containers"] for folder in (BASE, GPU))
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"] and cpu["image"].startswith("fewstep-worker-cpu:")
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and gpu["image"].startswith("fewstep-worker-gpu:")
    assert gpu["securityContext"] == cpu["securityContext"]
