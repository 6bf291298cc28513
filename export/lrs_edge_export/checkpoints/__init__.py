"""Checkpoints on disk, and what every family of them becomes.

`checkpoint.py` finds them, `tensors.py` and `rows.py` read them one tensor at a time, `model.py`
describes them as three stages.
"""
