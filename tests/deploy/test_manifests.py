"""The Kubernetes manifests: right by the schemas, fitting each other, and calling what the package has."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stepclaim.settings import Settings

from .commands import command_problems, help_of, known_variables
from .consistency import all_problems
from .documents import (
    KUBERNETES,
    KUSTOMIZATION,
    SCHEMA_VERSIONS,
    applied_files,
    containers_of,
    example_files,
    load,
    name_of,
    parse,
    pod_of,
    probes_of,
    schema_problems,
    workloads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .documents import Manifest

APPLIED = load(applied_files())
EXAMPLES = load(example_files())


def _named(kind: str, name: str, manifests: list[Manifest] = APPLIED) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def _worker(manifests: list[Manifest] = APPLIED) -> Manifest:
    container: Manifest = pod_of(_named("Deployment", "stepclaim-worker", manifests))["containers"][0]
    return container


def _etcd(manifests: list[Manifest] = APPLIED) -> Manifest:
    container: Manifest = pod_of(_named("StatefulSet", "etcd", manifests))["containers"][0]
    return container


@pytest.mark.parametrize("version", SCHEMA_VERSIONS)
@pytest.mark.parametrize("manifest", [*APPLIED, *EXAMPLES], ids=name_of)
def test_schema(manifest: Manifest, version: str) -> None:
    """Every manifest, the examples too, is right by the newest and the oldest schemas at hand."""
    assert schema_problems(manifest, version) == []


def test_two_different_schema_versions() -> None:
    """The two are not one by accident."""
    newest, oldest = (tuple(map(int, version.split(".")[:2])) for version in SCHEMA_VERSIONS)
    assert oldest < newest


def test_manifests_fit_each_other() -> None:
    """Selectors, ports, references and security contexts."""
    assert all_problems(APPLIED, EXAMPLES) == []


def test_every_file_is_applied_or_an_example() -> None:
    """No manifest lies about unused, and no example is applied."""
    applied, examples = set(applied_files()), set(example_files())
    assert applied | examples | {KUSTOMIZATION} == set(KUBERNETES.glob("*.yaml"))
    assert not applied & examples
    assert {manifest["kind"] for manifest in APPLIED} >= {
        *("Namespace", "ServiceAccount", "ConfigMap", "Service", "StatefulSet", "Deployment"),
        *("PodDisruptionBudget", "NetworkPolicy"),
    }


def test_no_secret_is_applied_or_real() -> None:
    """What an example holds is a word to be replaced."""
    assert not [name_of(manifest) for manifest in APPLIED if manifest["kind"] == "Secret"]
    secrets = [manifest for manifest in EXAMPLES if manifest["kind"] == "Secret"]
    assert secrets
    assert {value for secret in secrets for value in secret["stringData"].values()} == {"FILL-IN"}


def test_images_are_set_by_the_kustomization() -> None:
    """Each image is a bare name that the kustomization gives a place and a fixed version."""
    (kustomization,) = parse(KUSTOMIZATION.read_text())
    images = {image["name"]: image for image in kustomization["images"]}
    assert {container["image"] for workload in workloads(APPLIED) for container in containers_of(workload)} == set(
        images
    )
    assert all(image["newTag"] != "latest" for image in images.values())


def _store_environment() -> dict[str, str]:
    """Collect what the worker reads of the applied files alone, before a person has brought anything."""
    environment: dict[str, str] = dict(_named("ConfigMap", "stepclaim")["data"])
    for variable in _worker()["env"]:
        if "value" in variable:
            environment[variable["name"]] = variable["value"]
        elif "fieldRef" in variable["valueFrom"]:
            environment[variable["name"]] = "stepclaim-worker-abc-1"
    return environment


def test_environment_names_exist() -> None:
    """Every STEPCLAIM_ variable in any manifest is a setting or an option's twin."""
    used = {
        variable["name"]
        for workload in workloads(APPLIED)
        for c in containers_of(workload)
        for variable in c.get("env", [])
    }
    used |= {name for m in [*APPLIED, *EXAMPLES] if m["kind"] == "ConfigMap" for name in m["data"]}
    ours = {name for name in used if name.startswith("STEPCLAIM_")}
    assert ours >= {
        "STEPCLAIM_ENDPOINTS",
        "STEPCLAIM_OWNER",
        "STEPCLAIM_USER",
        "STEPCLAIM_PASSWORD",
        "STEPCLAIM_CA_FILE",
    }
    assert ours - known_variables() == set()


def test_settings_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings class takes what the ConfigMap gives, and the endpoints are the StatefulSet's members."""
    for name in [name for name in os.environ if name.startswith("STEPCLAIM_")]:
        monkeypatch.delenv(name)
    for name, value in _store_environment().items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.owner == "stepclaim-worker-abc-1"
    statefulset = _named("StatefulSet", "etcd")["spec"]
    members = [f"etcd-{number}" for number in range(statefulset["replicas"])]
    service = statefulset["serviceName"]
    assert list(settings.endpoints) == [f"{member}.{service}:2379" for member in members]
    cluster = ",".join(f"{member}=http://{member}.{service}:2380" for member in members)
    assert f"--initial-cluster={cluster}" in _etcd()["args"]


def test_commands_exist() -> None:
    """The worker's arguments and its probes are commands and options that the command line has."""
    worker = _worker()
    calls = [worker["args"], *(probe["exec"]["command"][1:] for _, probe in probes_of(worker))]
    assert [problem for call in calls for problem in command_problems(call)] == []
    assert "STEPCLAIM_HEALTH_FILE" in help_of("worker")


def test_probes_look_at_the_file_that_the_worker_writes() -> None:
    """One path in the environment and in all probes, on a volume that can be written; a restart comes last."""
    worker = _worker()
    environment = _store_environment()
    file = environment["STEPCLAIM_HEALTH_FILE"]
    ages = {}
    for name, probe in probes_of(worker):
        program, command, *options = probe["exec"]["command"]
        values = dict(zip(options[::2], options[1::2], strict=True))
        assert (program, command, values["--file"]) == ("stepclaim", "healthy", file)
        ages[name] = float(values["--max-age"])
    mounted = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(_named("Deployment", "stepclaim-worker"))["volumes"]}
    assert "emptyDir" in volumes[mounted[str(Path(file).parent)]]
    assert ages["readinessProbe"] < float(environment["STEPCLAIM_LEASE_TTL"]) < ages["livenessProbe"]


def test_tls_files_are_where_the_example_says() -> None:
    """The example's ConfigMap names files of the example's Secret, at the place where the worker mounts it."""
    (mount,) = (mount["mountPath"] for mount in _worker()["volumeMounts"] if mount["name"] == "tls")
    files = {f"{mount}/{name}" for name in _named("Secret", "stepclaim-etcd-tls", EXAMPLES)["stringData"]}
    assert set(_named("ConfigMap", "stepclaim-tls", EXAMPLES)["data"].values()) == files


# --- the checks can fail --------------------------------------------------------------------------------------------


def _misspell(manifests: list[Manifest]) -> None:
    _worker(manifests)["imagePullPolcy"] = _worker(manifests).pop("imagePullPolicy")


def _mistype(manifests: list[Manifest]) -> None:
    _named("StatefulSet", "etcd", manifests)["spec"]["replicas"] = "three"


def _unknown_kind(manifests: list[Manifest]) -> None:
    manifests[0]["kind"] = "Nonesuch"


@pytest.mark.parametrize("version", SCHEMA_VERSIONS)
@pytest.mark.parametrize("breaking", [_misspell, _mistype, _unknown_kind])
def test_schema_check_refuses(breaking: Callable[[list[Manifest]], None], version: str) -> None:
    """A misspelt field, a wrong type and an unknown kind are told, and nothing else is."""
    broken = copy.deepcopy(APPLIED)
    breaking(broken)
    assert len([problem for manifest in broken for problem in schema_problems(manifest, version)]) == 1


def _without(mapping: dict[str, Any], key: str) -> None:
    del mapping[key]


BREAKINGS: dict[str, tuple[str, Callable[[list[Manifest]], object]]] = {
    "own selector": (
        "its own template",
        lambda m: _named("Deployment", "stepclaim-worker", m)["spec"]["selector"]["matchLabels"].update(x="y"),
    ),
    "service's selector": ("no pods have", lambda m: _named("Service", "etcd", m)["spec"]["selector"].update(x="y")),
    "who may reach etcd": (
        "no pods have",
        lambda m: _without(
            _named("Deployment", "stepclaim-worker", m)["spec"]["template"]["metadata"]["labels"], "etcd-client"
        ),
    ),
    "service's port": (
        "port nonesuch is no container's",
        lambda m: _named("Service", "etcd", m)["spec"]["ports"][0].update(targetPort="nonesuch"),
    ),
    "policy's port": (
        "port 2390 is no container's",
        lambda m: _named("NetworkPolicy", "etcd", m)["spec"]["ingress"][1]["ports"][0].update(port=2390),
    ),
    "probe's port": ("asks port nonesuch", lambda m: _etcd(m)["livenessProbe"]["httpGet"].update(port="nonesuch")),
    "headless service": (
        "no headless Service",
        lambda m: _without(_named("Service", "etcd-peers", m)["spec"], "clusterIP"),
    ),
    "config map": ("not there and not optional", lambda m: m.remove(_named("ConfigMap", "stepclaim", m))),
    "secret that must be": (
        "Secret stepclaim-etcd password is not there and not optional",
        lambda m: _without(_worker(m)["env"][2]["valueFrom"]["secretKeyRef"], "optional"),
    ),
    "secret's key": (
        "no example tells",
        lambda m: _worker(m)["env"][2]["valueFrom"]["secretKeyRef"].update(key="nonesuch"),
    ),
    "service account": (
        "service account etcd is not there",
        lambda m: m.remove(_named("ServiceAccount", "etcd", m)),
    ),
    "volume": (
        "volume data is not there",
        lambda m: _without(_named("StatefulSet", "etcd", m)["spec"], "volumeClaimTemplates"),
    ),
    "variable": (r"\$\(POD_NAME\) in the arguments has no variable", lambda m: _etcd(m)["env"].clear()),
    "token": (
        "hands out its token",
        lambda m: _without(_named("ServiceAccount", "etcd", m), "automountServiceAccountToken"),
    ),
    "root": (
        "runAsNonRoot",
        lambda m: _without(pod_of(_named("StatefulSet", "etcd", m))["securityContext"], "runAsNonRoot"),
    ),
    "capabilities": ("capabilities.drop", lambda m: _without(_worker(m)["securityContext"], "capabilities")),
    "filesystem": (
        "readOnlyRootFilesystem",
        lambda m: _worker(m)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "probe": ("all three probes", lambda m: _without(_worker(m), "livenessProbe")),
}


@pytest.mark.parametrize(("told", "breaking"), BREAKINGS.values(), ids=BREAKINGS)
def test_consistency_check_refuses(told: str, breaking: Callable[[list[Manifest]], object]) -> None:
    """Each thing that is broken is told, in words that name it."""
    broken = copy.deepcopy(APPLIED)
    breaking(broken)
    problems = all_problems(broken, EXAMPLES)
    assert problems
    assert all(re.search(told, problem) for problem in problems)


def test_command_check_refuses() -> None:
    """An option that the worker does not have is told."""
    assert command_problems(["worker", "--nonesuch=1"]) == ["stepclaim worker has no option --nonesuch"]


# --- what kubectl makes of it ---------------------------------------------------------------------------------------


def _kubectl() -> str:
    unpacked = Path.home() / ".cache" / "stepclaim-tests" / "bin" / "kubectl"
    for candidate in (os.environ.get("STEPCLAIM_KUBECTL"), str(unpacked), "kubectl"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    pytest.skip("no kubectl: not named by STEPCLAIM_KUBECTL, not unpacked by .ci/kubectl, not on PATH")


def test_kustomize() -> None:
    """Kustomize's output is right by the schemas too, in one namespace, with every image in its place."""
    arguments = [_kubectl(), "kustomize", str(KUBERNETES)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    built = parse(done.stdout)
    assert sorted(map(name_of, built)) == sorted(map(name_of, APPLIED))
    assert [
        problem for version in SCHEMA_VERSIONS for manifest in built for problem in schema_problems(manifest, version)
    ] == []
    assert all_problems(built, EXAMPLES) == []
    assert {m["metadata"].get("namespace") for m in built if m["kind"] != "Namespace"} == {"stepclaim"}
    images = [container["image"] for workload in workloads(built) for container in containers_of(workload)]
    assert all(re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+", image) for image in images), images
