"""Engines: each runs one graph on one device; `placement.py` says which graph runs where."""
