"""Launcher for a checkout that is not installed: `python cli.py ask IMAGE QUESTION`."""

from pathlib import Path

import lrs_edge
from lrs_edge.cli import main

# pyproject.toml maps export/ and models/ into the package; without an installation this does.
lrs_edge.__path__.append(str(Path(__file__).parent))

if __name__ == "__main__":
    main()
