"""Whether the exported graphs still say what the checkpoint said, judged by PyTorch.

`check.py` first: every stage on the same inputs, made by `images.py` and `sequences.py`;
`layers.py` compares layer by layer where a stage does not fit into memory; `accuracy.py` asks a
finished bundle questions. What they say is in the manifest: `lrs_edge.bundle.parity`.
"""
