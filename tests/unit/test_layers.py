"""The tools that read the code: the layers, the style, the types. Each is one test, which fails with what it said."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))

if not (ROOT / "src" / "stepclaim").is_dir():
    pytest.skip("these look at a checkout's src", allow_module_level=True)

SECONDS = 300

pytestmark = [pytest.mark.tools, pytest.mark.timeout(SECONDS)]


def complaint(program: str, *arguments: str) -> str:
    """Run one of this environment's tools in the checkout; "" if it is content, else all that it printed."""
    done = subprocess.run(
        [SCRIPTS / program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}" or f"{program} ended with {done.returncode}"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["lint-imports"], id="imports-run-one-way"),
        pytest.param(["ruff", "check"], id="ruff-check"),
        pytest.param(["ruff", "format", "--check", "--diff"], id="ruff-format"),
        pytest.param(["mypy"], id="mypy-strict"),
    ],
)
def test_is_clean(command: list[str]) -> None:
    """An error of the tool's own is a failure, too."""
    said = complaint(*command)
    if said:
        pytest.fail(f"{' '.join(command)}:\n{said}", pytrace=False)
