"""What containers call and set, compared with what the package has: the settings' names and the commands' options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache

from stepclaim.settings import Settings

# Twins of options of `stepclaim worker`, not settings of the store; its --help names them.
_COMMAND_VARIABLES = frozenset({"STEPCLAIM_HEALTH_FILE"})


def known_variables() -> frozenset[str]:
    """Every environment variable that a worker reads."""
    prefix = Settings.model_config["env_prefix"]
    return frozenset(f"{prefix}{name}".upper() for name in Settings.model_fields) | _COMMAND_VARIABLES


@cache
def help_of(command: str) -> str:
    """Ask `stepclaim COMMAND --help`, without colours or boxes' line breaks."""
    environment = {**os.environ, "COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1", "TERM": "dumb"}
    program = "import sys; from stepclaim.cli import main; sys.argv[0] = 'stepclaim'; sys.exit(main())"
    arguments = [sys.executable, "-c", program, command, "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"stepclaim {command} --help ended with {done.returncode}: {done.stderr}"
    return done.stdout


def command_problems(arguments: list[str]) -> list[str]:
    """Options of a call, from the subcommand on, that the subcommand does not have."""
    command, *rest = arguments
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(command)))
    options = {argument.partition("=")[0] for argument in rest if argument.startswith("--")}
    return [f"stepclaim {command} has no option {option}" for option in sorted(options - known)]
