"""The command from a checkout: `python cli.py ask IMAGE QUESTION`."""

from lrs_edge.commands.main import main

main()
