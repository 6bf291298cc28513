"""One file per command of `lrs-edge`."""
