"""What it was measured on, without the machine's name or any path; and a folder that lies on a disk."""

from __future__ import annotations

import os
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def use_a_disk() -> str:
    """Have all temporary folders made on a disk, where a sync costs what it costs; give the file system's kind."""
    for folder in (tempfile.gettempdir(), "/var/tmp", str(Path.home())):  # noqa: S108  # looked at, not written to
        kind = _file_system(folder)
        if kind not in _IN_MEMORY and os.access(folder, os.W_OK):
            tempfile.tempdir = folder
            return kind
    raise SystemExit("no folder on a disk: set TMPDIR to one")


def _file_system(folder: str) -> str:
    real = os.path.realpath(folder)
    found = ("", "unknown")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split(" ")
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def describe(file_system: str) -> dict[str, Any]:
    """Tell processor, memory, kernel and versions."""
    names = ("stepclaim", "grpcio", "protobuf", "cslab-etcd3", "msgspec")
    return {
        "at": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "file_system": file_system,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "packages": {name: version(name) for name in names},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
