"""What schemas don't see: whether the manifests fit each other. Each check takes all of them and says what is wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .documents import containers_of, name_of, pod_of, probes_of, workloads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .documents import Manifest


def _matches(selector: dict[str, str], workload: Manifest) -> bool:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    return bool(selector) and selector.items() <= labels.items()


def _selected(selector: dict[str, str], manifests: list[Manifest]) -> list[Manifest]:
    return [workload for workload in workloads(manifests) if _matches(selector, workload)]


def _ports(workload: Manifest) -> set[str | int]:
    ports: set[str | int] = set()
    for container in containers_of(workload):
        for port in container.get("ports", []):
            ports |= {port["containerPort"], port.get("name", port["containerPort"])}
    return ports


def selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Selectors that select nothing."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment" | "StatefulSet":
                if not _matches(spec["selector"]["matchLabels"], manifest):
                    yield f"{name_of(manifest)}: its selector does not match its own template's labels"
                continue
            case "Service":
                selectors = [spec["selector"]]
            case "PodDisruptionBudget":
                selectors = [spec["selector"]["matchLabels"]]
            case "NetworkPolicy":
                peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
                selectors = [part["podSelector"]["matchLabels"] for part in (spec, *peers)]
            case _:
                continue
        for selector in selectors:
            if not _selected(selector, manifests):
                yield f"{name_of(manifest)}: no pods have {selector}"


def port_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Ports of Services and policies that no container has."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                wanted = [port.get("targetPort", port["port"]) for port in spec["ports"]]
                targets = _selected(spec["selector"], manifests)
            case "NetworkPolicy":
                wanted = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
                targets = _selected(spec["podSelector"]["matchLabels"], manifests)
            case _:
                continue
        for port in wanted:
            if not all(port in _ports(target) for target in targets):
                yield f"{name_of(manifest)}: port {port} is no container's"


def probe_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Probes of ports that the container does not name."""
    for workload in workloads(manifests):
        for container in containers_of(workload):
            for name, probe in probes_of(container):
                port = probe.get("httpGet", {}).get("port")
                if port is not None and port not in _ports(workload):
                    yield f"{name_of(workload)}: {name} asks port {port}, which the container does not name"


def service_problems(manifests: list[Manifest]) -> Iterator[str]:
    """StatefulSets without the headless Service that gives their pods names."""
    services = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    headless = {service["metadata"]["name"] for service in services if service["spec"].get("clusterIP") == "None"}
    for workload in workloads(manifests):
        wanted = workload["spec"].get("serviceName")
        if workload["kind"] == "StatefulSet" and wanted not in headless:
            yield f"{name_of(workload)}: there is no headless Service {wanted}"


_REFERENCES = {
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "configMap": "ConfigMap",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
    "secret": "Secret",
}


def _references(workload: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place where a pod names a ConfigMap or a Secret: the kind, and the reference."""
    places = list(pod_of(workload).get("volumes", []))
    for container in containers_of(workload):
        places += container.get("envFrom", [])
        places += [variable.get("valueFrom", {}) for variable in container.get("env", [])]
    for place in places:
        for field, kind in _REFERENCES.items():
            if field in place:
                reference = place[field]
                yield kind, {**reference, "name": reference.get("name", reference.get("secretName"))}


def _has(kind: str, reference: dict[str, Any], manifests: list[Manifest]) -> bool:
    for manifest in manifests:
        if manifest["kind"] == kind and manifest["metadata"]["name"] == reference["name"]:
            keys: dict[str, Any] = {**manifest.get("data", {}), **manifest.get("stringData", {})}
            return "key" not in reference or reference["key"] in keys
    return False


def reference_problems(manifests: list[Manifest], examples: list[Manifest]) -> Iterator[str]:
    """ConfigMaps and Secrets that are not there; one that a person brings may be missing if an example tells of it."""
    for workload in workloads(manifests):
        for kind, reference in _references(workload):
            described = f"{name_of(workload)}: {kind} {reference['name']} {reference.get('key', '')}".rstrip()
            if _has(kind, reference, manifests):
                continue
            if not reference.get("optional", False):
                yield f"{described} is not there and not optional"
            elif not _has(kind, reference, examples):
                yield f"{described} is optional, but no example tells what it holds"


def name_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Service accounts, volumes and variables that a pod names and that are not there."""
    accounts = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ServiceAccount"}
    for workload in workloads(manifests):
        pod = pod_of(workload)
        if pod.get("serviceAccountName") not in accounts:
            yield f"{name_of(workload)}: service account {pod.get('serviceAccountName')} is not there"
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | {
            claim["metadata"]["name"] for claim in claims
        }
        for container in containers_of(workload):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            for volume in sorted(mounted - volumes):
                yield f"{name_of(workload)}: volume {volume} is not there"
            variables = {variable["name"] for variable in container.get("env", [])}
            used = set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []))))
            for variable in sorted(used - variables):
                yield f"{name_of(workload)}: $({variable}) in the arguments has no variable, so it stays as it stands"


def security_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Pods that ask for more than they need, or say nothing of what they need."""
    for account in (manifest for manifest in manifests if manifest["kind"] == "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name_of(account)}: hands out its token"
    for workload in workloads(manifests):
        pod = pod_of(workload)
        context = pod.get("securityContext", {})
        expected: list[tuple[str, object, object]] = [
            ("automountServiceAccountToken", pod.get("automountServiceAccountToken"), False),
            ("runAsNonRoot", context.get("runAsNonRoot"), True),
            ("seccompProfile", context.get("seccompProfile", {}).get("type"), "RuntimeDefault"),
            ("a numeric user", isinstance(context.get("runAsUser"), int) and context["runAsUser"] > 0, True),
            ("a grace period", "terminationGracePeriodSeconds" in pod, True),
            ("no host namespaces", any(pod.get(f"host{name}") for name in ("Network", "PID", "IPC")), False),
        ]
        for container in containers_of(workload):
            own = container.get("securityContext", {})
            expected += [
                ("allowPrivilegeEscalation", own.get("allowPrivilegeEscalation"), False),
                ("privileged", own.get("privileged"), False),
                ("readOnlyRootFilesystem", own.get("readOnlyRootFilesystem"), True),
                ("capabilities.drop", own.get("capabilities", {}).get("drop"), ["ALL"]),
                ("capabilities.add", own.get("capabilities", {}).get("add"), None),
                ("requests", set(container.get("resources", {}).get("requests", {})), {"cpu", "memory"}),
                ("a memory limit", "memory" in container.get("resources", {}).get("limits", {}), True),
                ("all three probes", len(list(probes_of(container))), 3),
            ]
        for what, found, wanted in expected:
            if found != wanted:
                yield f"{name_of(workload)}: {what}: {found!r}, not {wanted!r}"


def all_problems(manifests: list[Manifest], examples: list[Manifest]) -> list[str]:
    """Everything that the checks above find."""
    return [
        *selector_problems(manifests),
        *port_problems(manifests),
        *probe_problems(manifests),
        *service_problems(manifests),
        *reference_problems(manifests, examples),
        *name_problems(manifests),
        *security_problems(manifests),
    ]
