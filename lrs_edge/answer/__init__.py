"""Answers: what a question returns, and the forms in which it is written.

Read `answer.py` first: the dataclasses that a program is given. `evidence.py` makes regions and
counts of what the search found, `report.py` writes JSON, GeoJSON and text, `trace.py` the arrays of
every step.
"""
