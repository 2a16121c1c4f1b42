"""A virtual environment for each peer: two packages with protobuf messages of etcd can't be in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import venv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


_making = threading.Lock()


class CannotRunError(Exception):
    """A peer can't run here, and why."""


def environment(pins: Sequence[str]) -> Path:
    """Give the Python of an environment with these packages, made where it is not there yet.

    They are kept in `~/.cache/stepclaim-tests/peers`, or where STEPCLAIM_PEERS says. Without pins it is our own.
    """
    if not pins:
        return Path(sys.executable)
    kept = os.environ.get("STEPCLAIM_PEERS") or Path.home() / ".cache" / "stepclaim-tests" / "peers"
    folder = Path(kept) / pins[0].replace("==", "-")
    python, done = folder / "bin" / "python", folder / "pins.txt"
    wanted = "\n".join([sys.version, *pins])
    with _making:
        if done.exists() and done.read_text(encoding="utf-8") == wanted:
            return python
        venv.create(folder, clear=True, with_pip=True)
        command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if made.returncode:
            raise CannotRunError(f"pip could not install {', '.join(pins)}: {made.stderr.strip()[-300:]}")
        done.write_text(wanted, encoding="utf-8")  # last: an environment that was made half is made anew
        return python
