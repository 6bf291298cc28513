"""Measuring the stages of a bundle on this machine, against what the machine could do at best.

`run.py` runs the chosen stages (`engines.py`, `reading.py`, `loading.py`) with the runtime's own
objects, `peaks.py` measures the machine, `floor.py` computes the least time a stage could take, and
`tables.py` writes it down. `lrs-edge bench` is the command; docs/bench.md says how to read it.
"""
