"""Runs among the contract's tests against the wheel: whatever of stepclaim was imported lies in this environment."""

import sys
from importlib.metadata import distribution
from pathlib import Path

import stepclaim


def test_every_module_is_the_wheels() -> None:
    environment = Path(sys.prefix)
    assert environment != Path(sys.base_prefix)
    assert Path(stepclaim.__file__).is_relative_to(environment)
    files = {
        name: module.__file__
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "stepclaim" and module.__file__
    }
    assert {"stepclaim._core.claims", "stepclaim._etcd.wire", "stepclaim.testing"} <= set(files)
    assert not {name: file for name, file in files.items() if not Path(file).is_relative_to(environment)}
    assert Path(str(distribution("stepclaim").locate_file(""))).is_relative_to(environment)
