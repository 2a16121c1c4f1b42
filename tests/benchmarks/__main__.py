"""Measures stepclaim against the bare stub and against its peers: `python -m tests.benchmarks`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
