"""`python -m lrs_edge` is `lrs-edge`."""

from lrs_edge.cli import main

if __name__ == "__main__":
    main()
