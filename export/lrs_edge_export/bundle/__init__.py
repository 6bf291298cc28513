"""Bundles: the order in which their files are written, and the files that are not graphs.

`writer.py` first: the whole export. `options.py` is what can be asked for, `stages.py` writes the
graphs of the three stages, `embeddings.py`, `tokenizer_json.py`, `manifest.py` and `model_card.py`
the rest, `target.py` makes all of it appear at once.
"""
