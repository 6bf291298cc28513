"""Backends: each runs one graph on one kind of engine."""
