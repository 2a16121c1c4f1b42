"""Where a cluster runs: the wheel's etcd, other versions of it, network namespaces, containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from faults.cluster import Cluster, Impossible, Options
from faults.containers import ContainerCluster
from faults.namespaces import NamespaceCluster
from servers import find_etcd_versions

if TYPE_CHECKING:
    from pathlib import Path

    from faults.nemesis import Fault


@dataclass(frozen=True)
class Variant:
    """One of them."""

    cluster: type[Cluster] = Cluster
    version: str | None = None

    def binary(self) -> Path | None:
        """Find the etcd; `Impossible` where it isn't there."""
        if self.version is None:
            return None
        found = find_etcd_versions().get(self.version)
        if found is None:
            raise Impossible(f"there is no etcd {self.version} on this machine: .ci/etcd-versions fetches it")
        return found

    def make(self, options: Options) -> Cluster:
        """Make the cluster, not started yet."""
        return self.cluster(options)

    def can(self, kind: type[Fault]) -> bool:
        """Tell whether a fault can be done there."""
        if self.cluster is NamespaceCluster:
            return not kind.proxies and not {"tls", "small_disk"}.intersection(kind.needs)
        if self.cluster is ContainerCluster:
            return not {"tls", "auth", "small_disk"}.intersection(kind.needs)
        return True


VARIANTS: dict[str, Variant] = {
    "binary": Variant(),
    "3.4.23": Variant(version="3.4.23"),
    "3.5.16": Variant(version="3.5.16"),
    "namespaces": Variant(NamespaceCluster),
    "container": Variant(ContainerCluster),
}
