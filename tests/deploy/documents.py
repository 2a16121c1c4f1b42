"""The deployed files as data, and the check of one manifest against Kubernetes' own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import kubernetes_validate
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

Manifest: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = KUBERNETES / "kustomization.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"

_WORKLOADS = frozenset({"Deployment", "StatefulSet"})
# The newest schemas that the package holds, and the oldest: what both accept is neither removed nor new.
_ALL_VERSIONS: list[str] = kubernetes_validate.utils.all_versions()
SCHEMA_VERSIONS = (_ALL_VERSIONS[-1], _ALL_VERSIONS[0])


def parse(text: str) -> list[Manifest]:
    """Read every document of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


def applied_files() -> list[Path]:
    """List the files that the kustomization applies."""
    (kustomization,) = parse(KUSTOMIZATION.read_text())
    return [KUBERNETES / name for name in kustomization["resources"]]


def example_files() -> list[Path]:
    """List the files that a person fills in."""
    return sorted(KUBERNETES.glob("*.example.yaml"))


def load(files: list[Path]) -> list[Manifest]:
    """Read all manifests of some files."""
    return [manifest for file in files for manifest in parse(file.read_text())]


def name_of(manifest: Manifest) -> str:
    """Say a manifest's kind and name, for messages."""
    return f"{manifest.get('kind', '?')}/{manifest.get('metadata', {}).get('name', '?')}"


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    """Pick those that make pods."""
    return [manifest for manifest in manifests if manifest["kind"] in _WORKLOADS]


def pod_of(workload: Manifest) -> Manifest:
    """Give the spec of a workload's pod template."""
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def containers_of(workload: Manifest) -> list[Manifest]:
    """List all containers of a workload's pods, those that only initialise them included."""
    pod = pod_of(workload)
    return [*pod.get("initContainers", []), *pod["containers"]]


def probes_of(container: Manifest) -> Iterator[tuple[str, Manifest]]:
    """List a container's probes by name."""
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name in container:
            yield name, container[name]


def schema_problems(manifest: Manifest, version: str) -> list[str]:
    """Tell what one Kubernetes version's schemas refuse in a manifest; a field that they don't know is refused too."""
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(part) for part in error.path) or "the document"
        return [f"{name_of(manifest)} on Kubernetes {version}: {where}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{name_of(manifest)}: {error.message}"]
    return []
