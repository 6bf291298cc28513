"""`python -m lrs_edge` is `lrs-edge`."""

from lrs_edge.commands.main import main

if __name__ == "__main__":
    main()
