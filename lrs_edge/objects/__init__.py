"""Objects that a bundle's detector finds, as pure functions over arrays.

`detections.py` reads the detector's maps of one tile; `merge.py` joins what was found on tiles of
several levels; `note.py` says it in words for the language model. Training imports the same
functions, so that a model is trained on what it will read.
"""

from lrs_edge.objects.detections import Detections, decode
from lrs_edge.objects.merge import merge
from lrs_edge.objects.note import describe

__all__ = ["Detections", "decode", "describe", "merge"]
