"""What the paper's method is compared with, in the same runtime.

`as_released.py` is the authors' released code, bug for bug (`--policy reference`). `unpruned.py`
looks at one whole level. `inside.py` drops tokens between layers of the language model (FastV,
PyramidDrop), which `segments.py` runs in pieces. `tower.py` compresses every tile before the
language model, by the rule of `visionzip.py` or of `prumerge.py`.
"""
