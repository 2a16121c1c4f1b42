"""The README's two commands are the ones that `.ci/run` runs, to the letter."""

import re
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / ".ci" / "run"

COMMANDS = {
    "test": "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest",
    "demo": "python3 -m venv .venv && .venv/bin/pip install -q '.[cli,embedded]' && .venv/bin/stepclaim demo",
}


def code_lines(text: str) -> list[str]:
    """Give the lines inside a Markdown text's fences."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_ci_runs_the_readmes_command(name: str) -> None:
    script = RUN.read_text(encoding="utf-8")
    assert re.findall(rf'^{name}_command="(.*)"$', script, flags=re.MULTILINE) == [COMMANDS[name]]
    assert script.count(f"${name}_command") == 1, "it is set, but not run"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_holds_the_command_on_a_line_of_its_own(name: str) -> None:
    assert code_lines((ROOT / "README.md").read_text(encoding="utf-8")).count(COMMANDS[name]) == 1


@pytest.mark.parametrize("script", sorted((ROOT / ".ci").iterdir()), ids=lambda script: script.name)
def test_ci_scripts_can_be_run(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    first, *rest = script.read_text(encoding="utf-8").splitlines()
    assert first == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in rest
