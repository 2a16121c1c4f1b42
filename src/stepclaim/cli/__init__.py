"""The command `stepclaim`: parse, call the store, print."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; it ends by `SystemExit` with the command's exit status."""
    try:
        from stepclaim.cli.app import app  # noqa: PLC0415 - what it needs is an extra
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "click", "rich"):
            raise
        sys.stderr.write(f"stepclaim's commands need {missing}: pip install 'stepclaim[cli]'\n")
        return 2
    except KeyboardInterrupt:
        return 130
    app(prog_name="stepclaim")
    return 0
