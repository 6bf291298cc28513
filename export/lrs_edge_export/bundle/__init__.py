"""A bundle's other files and the order in which all are written."""
