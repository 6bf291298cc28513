"""Ways to choose what the language model sees, and where to look; docs/pruning.md compares them.

`scorers.py` says how much a token matters. The searches say which tiles are looked at:
`coarse_to_fine.py` (the paper), `exhaustive.py`, `unpruned.py` (a whole level, no search) and
`as_released.py` (the authors' code). `inside.py` drops tokens between the language model's layers,
`tower.py` with `visionzip.py` and `prumerge.py` between the vision tower and the projector.
"""
